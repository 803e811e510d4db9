"""Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cairn.catalog import register
from cairn.data.corpora import Corpus, Document, digest_of
from cairn.errors import InputError, NotFoundError


@register("corpus", "hf")
class HuggingFace(Corpus):
    """A data set that `datasets` can load, by hub name or by path; streamed. Needs the extra `hf`."""

    path: str
    """Name on the hub, or a directory saved by `datasets`."""
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    """Commit of the data set; give one, so that the corpus can not change under a run."""
    field: str = "text"
    streaming: bool = True

    def documents(self) -> Iterator[Document]:
        for number, row in enumerate(self._rows()):
            text = row.get(self.field)
            if text is None:
                raise InputError(f"{self.path} has no field '{self.field}' (it has {', '.join(row)}); set field=NAME.")
            if text:
                yield Document(str(text), f"{self.path}:{number}", row)

    def _rows(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise InputError("Hugging Face datasets need the extra: pip install 'cairn-lm[hf]'.") from None
        from pathlib import Path

        try:
            if (Path(self.path) / "dataset_dict.json").exists():
                return datasets.load_from_disk(self.path)[self.split]
            if (Path(self.path) / "dataset_info.json").exists():
                return datasets.load_from_disk(self.path)
            return datasets.load_dataset(self.path, self.subset, split=self.split, revision=self.revision, streaming=self.streaming)
        except (FileNotFoundError, ConnectionError, ValueError, KeyError) as error:
            raise NotFoundError(f"The data set {self.path} could not be opened: {' '.join(str(error).split())[:200]}") from None

    def fingerprint(self) -> str:
        return digest_of(self.model_dump(mode="json"))
