"""Token stores: a corpus as memory-mapped token files, split by document into training and held-out parts.

A store is an immutable directory, there whole or not at all:

    meta.json                                 tokenizer, corpus, counts, digest
    train.bin         held_out.bin            token ids, in the narrowest of 16, 32 or 64 bits that holds the vocabulary
    train.documents   held_out.documents      uint64: where each document begins
    train.prefixes                            uint32: tokens of metadata at each document's beginning, if it was prepared with metadata

Each document is preceded by the tokenizer's end-of-text id. Preparing streams: memory does not grow with the corpus.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from cairn import cache
from cairn.checkpoint.format.documents import keep_json, read_object
from cairn.data import corpora
from cairn.data.corpora import Corpus, Document, passages
from cairn.data.text.metadata import Metadata, share_of
from cairn.data.text.tokenizer import Tokenizer
from cairn.errors import DamagedError, InputError, NotFoundError

FORMAT = 1
SPLITS = ("train", "held_out")
_BATCH_BYTES = 2 * 2**20


@dataclass(frozen=True)
class Split:
    """One part of a store: `tokens` and the `starts` of its documents, both memory-mapped; `bytes` of text behind them; `prefixes`, how
    many tokens of metadata follow the end-of-text id of each document, or None where there are none."""

    tokens: NDArray[Any]
    starts: NDArray[np.uint64]
    bytes: int
    prefixes: NDArray[np.uint32] | None = None

    def is_metadata(self, places: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the tokens at these places are metadata."""
        if self.prefixes is None:
            return np.zeros(places.shape, bool)
        number = np.searchsorted(self.starts, places.astype(np.uint64), side="right") - 1
        offset = places - self.starts[number].astype(np.int64)
        return (offset > 0) & (offset <= self.prefixes[number])


@dataclass(frozen=True)
class Selection:
    """Which documents of a corpus are trained on, and what stands in front of them. Held-out documents are always all of them, as they are."""

    metadata: Metadata | None = None
    about: tuple[tuple[str, str], ...] = ()
    """Fields that all documents share, for metadata."""
    part: tuple[float, float] = (0.0, 1.0)
    """The documents whose number from `share_of` lies in this range."""

    def holds(self, document: Document) -> bool:
        """Whether a document is trained on."""
        return self.part == (0.0, 1.0) or self.part[0] <= share_of(document.text, "part") < self.part[1]

    def prefix(self, document: Document) -> str | None:
        """What stands in front of it."""
        return self.metadata.prefix(document, dict(self.about)) if self.metadata is not None else None

    def identity(self) -> dict[str, Any]:
        """What decides the tokens; nothing where there is nothing to decide."""
        if self == Selection():
            return {}
        return {"metadata": self.metadata.identity() if self.metadata is not None else None, "about": list(self.about), "part": list(self.part)}


class TokenStore:
    """An opened store; `digest` identifies its tokens."""

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path, self.meta = path, meta

    @property
    def digest(self) -> str:
        return self.meta["digest"]

    @property
    def tokenizer_digest(self) -> str:
        return self.meta["tokenizer"]

    @functools.cached_property
    def train(self) -> Split:
        return self._split("train")

    @functools.cached_property
    def held_out(self) -> Split:
        return self._split("held_out")

    def _split(self, name: str) -> Split:
        counts = self.meta["splits"][name]
        tokens = _mapped(self.path / f"{name}.bin", np.dtype(self.meta["dtype"]), counts["tokens"])
        starts = _mapped(self.path / f"{name}.documents", np.dtype("<u8"), counts["documents"])
        shown = name == "train" and self.meta.get("metadata") is not None
        return Split(tokens, starts, counts["bytes"], _mapped(self.path / f"{name}.prefixes", np.dtype("<u4"), counts["documents"]) if shown else None)


def open_store(path: str | Path) -> TokenStore:
    """Open a prepared store. Raises `NotFoundError` if there is none at `path`, `DamagedError` if its files are not whole."""
    path = Path(path)
    try:
        meta = read_object(path / "meta.json")
    except FileNotFoundError:
        raise NotFoundError(f"There is no token store at {path}; `cairn data prepare` makes one.") from None
    if meta.get("format") != FORMAT:
        raise DamagedError(f"{path} has store format {meta.get('format')}; this version of cairn reads {FORMAT}.")
    return TokenStore(path, meta)


def prepare(
    corpus: Corpus | str,
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    held_out: float = 0.01,
    progress: Callable[[int], object] | None = None,
    selection: Selection | None = None,
) -> TokenStore:
    """Turn a corpus into the token store `out`, in constant memory; `progress` is told the bytes of text done.

    A share `held_out` of the documents, chosen by a digest of their text, goes into the held-out split: the same
    document lands on the same side whatever else the corpus holds. One of more than a million characters is cut (see `passages`).
    Raises `InputError` if `out` exists or nothing is found.
    """
    out, source = Path(out), corpora.resolve(corpus)
    if out.exists():
        raise InputError(f"{out} exists; a token store is never overwritten, choose another place.")
    if tokenizer.eos_id is None:
        raise InputError("This tokenizer has no end-of-text token, which must stand between documents.")
    cache.publish(out, lambda folder: _fill(folder, source, tokenizer, held_out, progress, selection or Selection()))
    return open_store(out)


def prepared_at(corpus: Any) -> Path | None:
    """Where the store lies that a corpus names, None if it names none."""
    if isinstance(corpus, Mapping) and set(corpus) == {"store"}:
        return Path(corpus["store"])
    return Path(corpus) if isinstance(corpus, str | Path) and corpora.is_store(corpus) else None


def prepare_cached(
    corpus: Any, tokenizer: Tokenizer, *, held_out: float = 0.01, progress: Callable[[int], object] | None = None, selection: Selection | None = None
) -> TokenStore:
    """The store of a corpus from the user's cache, prepared there first if need be. The path of a store, or a mapping `{store: PATH}`, opens that one."""
    prepared = prepared_at(corpus)
    if prepared is not None:
        if selection is not None:
            raise InputError(f"{prepared} is prepared already, and metadata go in while documents are prepared; name the corpus instead.")
        store = open_store(prepared)
        if store.tokenizer_digest != tokenizer.digest:
            raise InputError(f"{prepared} was prepared with another tokenizer; data.tokenizer={prepared} takes the one that it was prepared with.")
        return store
    source = corpora.resolve(corpus)
    key = corpora.digest_of(FORMAT, source.fingerprint(), tokenizer.digest, held_out, *([selection.identity()] if selection else []))[:24]
    path = cache.directory() / "tokens" / key
    return open_store(path) if path.exists() else prepare(source, tokenizer, path, held_out=held_out, progress=progress, selection=selection)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest unsigned little-endian type that holds every id below `vocab_size`."""
    return np.dtype(next(code for code, width in (("<u2", 16), ("<u4", 32), ("<u8", 64)) if vocab_size <= 2**width))


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out split: decided by its text alone."""
    number = int.from_bytes(blake3(text.encode(errors="surrogatepass")).digest(8), "little")
    return number < share * 2.0**64


def _fill(folder: Path, source: Corpus, tokenizer: Tokenizer, held_out: float, progress: Callable[[int], object] | None, selection: Selection) -> None:
    dtype, encoded_prefix = token_dtype(tokenizer.vocab_size), functools.lru_cache(maxsize=4096)(tokenizer.encode)
    with _SplitWriter(folder, "train", dtype) as train, _SplitWriter(folder, "held_out", dtype) as held:
        done = 0
        for documents, encoded in _encoded(source, tokenizer):
            for document, ids in zip(documents, encoded, strict=True):
                size = len(document.text.encode(errors="surrogatepass"))
                if is_held_out(document.text, held_out):
                    held.add(tokenizer.eos_id, ids, size)
                elif selection.holds(document):
                    prefix = selection.prefix(document)
                    train.add(tokenizer.eos_id, ids, size, encoded_prefix(prefix) if prefix else [])
                done += size
            if progress is not None:
                progress(done)
    if not train.documents:
        raise InputError(f"The corpus {source.model_dump(mode='json')} gave no document to train on.")
    meta = {
        "format": FORMAT,
        "digest": blake3((train.digest + held.digest).encode()).hexdigest(),
        "dtype": dtype.str,
        "tokenizer": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.eos_id,
        "corpus": source.model_dump(mode="json") | source.describe(),
        "held_out": held_out,
        **selection.identity(),
        "splits": {writer.name: {"tokens": writer.tokens, "documents": writer.documents, "bytes": writer.bytes} for writer in (train, held)},
    }
    if selection.metadata is None:
        (folder / "train.prefixes").unlink()
    (folder / "held_out.prefixes").unlink()
    tokenizer.save(folder)
    keep_json(folder / "meta.json", meta)


def _encoded(source: Corpus, tokenizer: Tokenizer) -> Iterator[tuple[list[Document], list[list[int]]]]:
    """Batches of documents with their ids: while one batch is encoded on all cores, the next is read and the last is written."""
    with ThreadPoolExecutor(1) as pool:
        waiting: list[tuple[list[Document], Future[list[list[int]]]]] = []
        for batch in _batches(source):
            waiting.append((batch, pool.submit(tokenizer.encode_batch, [document.text for document in batch])))
            if len(waiting) > 2:
                documents, future = waiting.pop(0)
                yield documents, future.result()
        for documents, future in waiting:
            yield documents, future.result()


def _batches(source: Corpus) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in passages.cut(source.documents()):
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """Appends documents to one split's two files and digests the tokens as they pass."""

    def __init__(self, folder: Path, name: Literal["train", "held_out"], dtype: np.dtype[Any]) -> None:
        self.name, self._dtype, self._hash = name, dtype, blake3()
        self._tokens, self._starts, self._prefixes = ((folder / f"{name}.{kind}").open("wb") for kind in ("bin", "documents", "prefixes"))
        self.tokens = self.documents = self.bytes = 0

    def add(self, eos: int | None, ids: list[int], size: int, prefix: Sequence[int] = ()) -> None:
        data = np.array([eos, *prefix, *ids], dtype=self._dtype).tobytes()
        self._prefixes.write(len(prefix).to_bytes(4, "little"))
        self._tokens.write(data)
        self._hash.update(data)
        self._starts.write(self.tokens.to_bytes(8, "little"))
        self.tokens += len(prefix) + len(ids) + 1
        self.documents += 1
        self.bytes += size

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> _SplitWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._tokens.close()
        self._starts.close()
        self._prefixes.close()


def _mapped(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    if not path.is_file() or path.stat().st_size != count * dtype.itemsize:
        raise DamagedError(f"{path} is missing or not whole; delete the store and prepare it again.")
    return np.memmap(path, dtype=dtype, mode="r") if count else np.zeros(0, dtype)
