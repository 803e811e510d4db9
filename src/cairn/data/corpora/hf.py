"""Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cairn import cache
from cairn.catalog import register
from cairn.data import files
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
    """Commit of the data set; give one, so that the corpus cannot change under a run."""
    field: str = "text"
    streaming: bool = True

    def documents(self) -> Iterator[Document]:
        for number, row in enumerate(self._rows()):
            text = row.get(self.field)
            if text is None and self.field in row:
                continue
            if text is None:
                raise InputError(f"{self.path} has no field '{self.field}' (it has {', '.join(row)}); set field=NAME.")
            if not isinstance(text, str):
                raise InputError(f"The field '{self.field}' of {self.path} holds {type(text).__name__}, not text; set field=NAME (it has {', '.join(row)}).")
            if text:
                yield Document(text, f"{self.path}:{number}", row)

    def _rows(self) -> Any:
        def rows(module: Any) -> Any:
            if (Path(self.path) / "dataset_dict.json").exists():
                return module.load_from_disk(self.path)[self.split]
            if (Path(self.path) / "dataset_info.json").exists():
                return module.load_from_disk(self.path)
            return module.load_dataset(self.path, self.subset, split=self.split, revision=self.revision, streaming=self.streaming)

        return self._opened(rows)

    def _opened(self, how: Callable[[Any], Any]) -> Any:
        """What `datasets` gives. Raises `InputError` without the extra and `NotFoundError` for what cannot be opened."""
        try:
            import datasets
        except ImportError:
            raise InputError("Hugging Face datasets need the extra: pip install 'cairn-lm[hf]'.") from None
        try:
            return how(datasets)
        except (FileNotFoundError, ConnectionError, ValueError, KeyError) as error:
            raise NotFoundError(f"The data set {self.path} could not be opened: {' '.join(str(error).split())[:200]}") from None

    def fingerprint(self) -> str:
        options = self.model_dump(mode="json", exclude={"path"})
        if Path(self.path).is_dir():
            return digest_of("hf", options, cache.contents(sorted(path for path in files.below(Path(self.path)))))
        return digest_of("hf", self.path, options, self._revision())

    def _revision(self) -> str:
        """What identifies the contents of a data set on the hub: its commit, or what `datasets` has of it without a network."""
        return str(self._opened(lambda module: module.load_dataset_builder(self.path, self.subset, revision=self.revision).hash))
