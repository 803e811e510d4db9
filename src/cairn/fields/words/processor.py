"""How a word becomes numbers that a model reads: the hashed pieces of its letters.

    <word> -> its pieces of 3 to 5 letters -> crc32 modulo the number of buckets

Nothing has to be learned for it and no word is unknown, in any language.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from cairn.checkpoint.format import documents
from cairn.checkpoint.format.place import place
from cairn.errors import MismatchError, NotFoundError
from cairn.training.fields import class_names

FILE = "word_processor_config.json"
EMPTY, HIDDEN = 0, 1
"""Numbers that are no piece of a word: nothing stands here, and a word stands here that is not to be seen."""
FIRST = 2
"""The number of the first bucket."""
MOST_BUCKETS = 2**24


@dataclass(frozen=True)
class WordProcessor:
    """Words as the numbers of their pieces of `pieces[0]` to `pieces[1]` letters."""

    file: ClassVar[str] = FILE

    buckets: int = 2**14
    pieces: tuple[int, int] = (3, 5)
    classes: tuple[str, ...] = ()
    """Names of the tags by number, where the processor lies beside a model that knows them; config.json has them."""

    @property
    def vocab_size(self) -> int:
        """Numbers that a model has to know."""
        return self.buckets + FIRST

    @property
    def digest(self) -> str:
        """Identity of what it does to words."""
        return blake3(self.files()[FILE]).hexdigest()

    def __call__(self, word: str) -> list[int]:
        """The numbers of a word, sorted, each once."""
        text = f"<{word}>"
        short, long = self.pieces
        pieces = {text[i : i + size] for size in range(short, long + 1) for i in range(max(1, len(text) - size + 1))}
        return sorted({FIRST + zlib.crc32(piece.encode("utf-8", "surrogatepass")) % self.buckets for piece in pieces})

    def table(self, words: Iterable[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The numbers of many words, one after the other, and where each word begins."""
        rows = [self(word) for word in words]
        return np.array([number for row in rows for number in row], np.int64), np.cumsum([0, *map(len, rows)])

    def knowing(self, classes: Sequence[str]) -> WordProcessor:
        """The same for a model of these tags."""
        return replace(self, classes=tuple(classes))

    def files(self) -> dict[str, bytes]:
        """The file that a checkpoint carries."""
        values = {"buckets": self.buckets, "hash": "crc32", "pieces": list(self.pieces), "word_processor_type": "HashedPieces"}
        return {FILE: (json.dumps(values, indent=2) + "\n").encode()}

    @classmethod
    def load(cls, path: str | Path) -> WordProcessor:
        """From the file of a directory. Raises `NotFoundError` if there is none, `DamagedError` or `MismatchError` for one that does something else."""
        file = place(path) / FILE
        if not file.exists():
            raise NotFoundError(f"{path} has no {FILE}, so words cannot be given to its model.")
        values = documents.read_object(file)
        buckets, pieces = values.get("buckets"), values.get("pieces")
        if not isinstance(buckets, int) or not _whole(buckets) or buckets > MOST_BUCKETS:
            raise MismatchError(f"{file}: buckets={buckets!r} is not a number from 1 to {MOST_BUCKETS}.")
        if not (isinstance(pieces, list) and len(pieces) == 2 and all(map(_whole, pieces)) and pieces[0] <= pieces[1] <= 16):
            raise MismatchError(f"{file}: pieces={pieces!r} has to give the shortest and the longest piece, of 1 to 16 letters.")
        if values.get("hash") != "crc32":
            raise MismatchError(f"{file}: hash={values.get('hash')!r} is not known; there is crc32.")
        return cls(buckets, (pieces[0], pieces[1])).knowing(class_names(place(path)))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
