"""Blocks of a file that several processes write: how many bytes of each are there, and whose digest it is to make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from blake3 import blake3

from cairn.checkpoint.format.manifest import BLOCK_BYTES
from cairn.errors import CairnError

KEPT_BYTES = 64 * 2**10
"""Bytes that came before their turn are kept up to this many at a time; a block with more of them is read back instead."""


class Running:
    """The digest of a block from its bytes as they are written, which saves reading them back: in order, or in small pieces."""

    def __init__(self) -> None:
        self._hash, self._upto = blake3(), 0
        self._early: dict[int, bytes] = {}
        self._lost = False

    def take(self, offset: int, data: memoryview | None) -> None:
        """Bytes that came at `offset` of the block; None if they are not at hand."""
        if data is None or (offset != self._upto and len(data) > KEPT_BYTES):
            self._lost = True
        if self._lost or data is None:
            return
        if offset != self._upto:
            self._early[offset] = bytes(data)
            return
        self._hash.update(data)
        self._upto += len(data)
        while (kept := self._early.pop(self._upto, None)) is not None:
            self._hash.update(kept)
            self._upto += len(kept)

    def digest(self) -> str | None:
        """Hexadecimal, once every byte has come; None if some were not at hand in their turn."""
        return None if self._lost or self._early else self._hash.hexdigest()


class Rows(NamedTuple):
    """`runs` runs of `width` bytes in a file, the first at `first`, each `distance` bytes after the one before."""

    first: int
    runs: int
    width: int
    distance: int

    def before(self, position: int) -> int:
        """Bytes of these runs that lie before a position."""
        whole, rest = divmod(max(0, position - self.first), self.distance)
        return min(whole, self.runs) * self.width + (min(rest, self.width) if whole < self.runs else 0)

    def by_block(self) -> Iterator[tuple[int, int]]:
        """(block, bytes of these runs in it) for every block that they touch."""
        if not self.runs or not self.width:
            return
        end = self.first + (self.runs - 1) * self.distance + self.width
        for block in range(self.first // BLOCK_BYTES, (end - 1) // BLOCK_BYTES + 1):
            inside = self.before((block + 1) * BLOCK_BYTES) - self.before(block * BLOCK_BYTES)
            if inside:
                yield block, inside


def sizes(size: int) -> list[int]:
    """Bytes of each block of a file of `size` bytes."""
    return [min(BLOCK_BYTES, size - begin) for begin in range(0, size, BLOCK_BYTES)]


def left_open(name: str, size: int, missing: Sequence[Sequence[int]]) -> list[int]:
    """The blocks that no process completed alone, from the bytes of each block that each process has not written.

    Raises `CairnError` unless every byte was written exactly once.
    """
    written = [sum(whole - process[block] for process in missing) for block, whole in enumerate(sizes(size))]
    wrong = sum(abs(whole - count) for whole, count in zip(sizes(size), written, strict=True))
    if wrong:
        raise CairnError(f"{name}: {wrong} bytes were not written exactly once.")
    return [block for block in range(len(written)) if all(process[block] for process in missing)]
