"""Corpora: where documents come from. One options class per kind of source, found by name or by path.

A corpus yields its documents one by one in an order that does not change, and has a fingerprint that changes when its
contents do, so that tokens are prepared once.
"""

from __future__ import annotations

import glob
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from blake3 import blake3

from cairn import cache, catalog
from cairn.data import files, reading
from cairn.errors import InputError, NotFoundError, suggestion
from cairn.options import Options, configure, override

SUFFIXES = {".txt": "text", ".md": "text", ".text": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}


class Document(NamedTuple):
    """A text, a name for it that is unique in its corpus, and whatever else is known of it (`url`, say)."""

    text: str
    id: str
    fields: Mapping[str, Any] = MappingProxyType({})


class Corpus(Options, ABC):
    """Base of all corpora."""

    catalog_kind: ClassVar[str] = "corpus"

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """The documents, always in the same order."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of the contents that decide the documents, never of names and times; cheap, it need not make them."""

    def describe(self) -> dict[str, str]:
        """Origin and license, where they are known."""
        return {}

    def digest(self) -> str:
        """A digest of the texts themselves, in their order; it reads them all."""
        found = blake3()
        for document in self.documents():
            found.update(document.text.encode(errors="surrogatepass") + b"\0")
        return found.hexdigest()

    def note(self) -> None:
        """Say that it is read (see `reading`), under its name and the options that differ from their defaults."""
        options = self.model_dump(mode="json", exclude_defaults=True)
        name = catalog.name_of(self) or type(self).__name__
        reading.note(f"{name} {json.dumps(options, sort_keys=True)}" if options else name, self.describe().get("origin", name), self.digest)


class FileCorpus(Corpus):
    """Base of corpora that lie in files of the user's."""

    paths: str | list[str]
    """A file, a folder (searched through, hidden names passed over), or a pattern like `books/*.txt`; or several. `.gz` and `.zst` are decompressed."""

    def files(self) -> list[Path]:
        """The files, sorted. Raises `NotFoundError` if there are none."""
        patterns = [self.paths] if isinstance(self.paths, str) else self.paths
        found = sorted({path for pattern in patterns for path in _expand(pattern)})
        if not found:
            raise NotFoundError(f"No file is found at {', '.join(patterns)}.")
        return found

    def note(self) -> None:
        """Files of the user's are named by nobody else."""

    def fingerprint(self) -> str:
        return digest_of(catalog.name_of(self), self.model_dump(mode="json", exclude={"paths"}), cache.contents(self.files()))


def resolve(spec: Any) -> Corpus:
    """The corpus that `spec` describes: a corpus already, a catalog name, a named data set, a path, or a mapping with `name`."""
    corpus = _resolved(spec)
    corpus.note()
    return corpus


def _resolved(spec: Any) -> Corpus:
    if isinstance(spec, Corpus):
        return spec
    if isinstance(spec, Mapping):
        return configure(Corpus, spec)
    if not isinstance(spec, (str, Path)):
        raise InputError(f"A corpus is written as a name, a path or a mapping with 'name', not as {spec!r}.")
    from cairn.data import datasets

    text = str(spec)
    if catalog.has("corpus", text):
        return configure(Corpus, text)
    if text in datasets.names():
        return configure(Corpus, {"name": "dataset", "dataset": text})
    kind = SUFFIXES.get(files.kind_of(Path(text)))
    if kind is not None:
        return configure(Corpus, {"name": kind, "paths": text})
    if is_store(text):
        raise InputError(f"{text} is a token store: it holds tokens, and texts are asked for here; name the corpus that it was prepared from.")
    if Path(text).is_dir():
        kinds = {SUFFIXES[kind] for path in files.below(Path(text)) if (kind := files.kind_of(path)) in SUFFIXES}
        if len(kinds) == 1:
            return configure(Corpus, {"name": kinds.pop(), "paths": text})
        raise InputError(f"{text} holds {'files of several kinds' if kinds else 'no text, JSONL or Parquet files'}; name the kind and a pattern.")
    known = [*catalog.names("corpus"), *datasets.names()]
    raise NotFoundError(f"There is no corpus '{text}'.{suggestion(text, known)} A path ends in {', '.join(SUFFIXES)}.")


def with_settings(spec: Any, settings: Iterable[str]) -> Corpus:
    """The corpus that `spec` describes with `key=value` settings of its options. Raises `InputError` that names the nearest key."""
    corpus = resolve(spec)
    named = catalog.name_of(corpus)
    values = override({"corpus": {"name": named, **corpus.model_dump(mode="json")}}, (f"corpus.{setting}" for setting in settings))
    return resolve(values["corpus"])


def is_store(path: str | Path) -> bool:
    """Whether a token store lies here, which `cairn data prepare` has made."""
    return (Path(path) / "meta.json").is_file() and (Path(path) / "train.bin").is_file()


def digest_of(*parts: Any) -> str:
    """A digest of plain values."""
    return blake3(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def distinct(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents without exact repetitions."""
    seen: set[bytes] = set()
    for document in documents:
        digest = blake3(document.text.encode(errors="surrogatepass")).digest(16)
        if digest not in seen:
            seen.add(digest)
            yield document


def up_to(documents: Iterable[Document], limit: int | None) -> Iterator[Document]:
    """The first documents, until `limit` bytes are reached."""
    total = 0
    for document in documents:
        if limit is not None and total >= limit:
            return
        total += len(document.text.encode(errors="surrogatepass"))
        yield document


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        return [each for each in files.below(path) if files.kind_of(each) in SUFFIXES]
    return [path] if path.is_file() else [Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file()]
