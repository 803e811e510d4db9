"""Blocks of a file that several processes write: how many bytes of each are there, and whose digest it is to make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cairn.checkpoint.manifest import BLOCK_BYTES
from cairn.errors import CairnError


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
