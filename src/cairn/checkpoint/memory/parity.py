"""Rotating parity over the members of a group: any `parity` of them may be lost with their memory, and nothing is.

The bytes of a member are cut into n - p blocks. Stripe i (there are n) has its parity number q on the member at position
i + q, and takes from each other member j its block (i - j - 1) mod n: every block is in exactly one stripe, every member
computes and holds p blocks of parity, and the memory costs p / (n - p) more instead of whole copies. One loss is an
exclusive or; more are a Reed-Solomon code by liberasurecode ("In-Memory Fault Tolerance of LLM Pretraining", 2310.12670).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cairn.errors import InputError

Bytes = NDArray[np.uint8]
WORD = 64
"""What a Reed-Solomon code takes at a time: its pieces are multiples of this many bytes."""


@dataclass(frozen=True)
class Code:
    """A group of `members`, of which any `parity` may be lost. Members go by their position in the group."""

    members: int
    parity: int

    def __post_init__(self) -> None:
        if not 1 <= self.parity < self.members:
            raise InputError(f"{self.parity} blocks of parity need a group of more than {self.parity} nodes, not of {self.members}.")

    @property
    def blocks(self) -> int:
        """Blocks of data of one member."""
        return self.members - self.parity

    def block_bytes(self, longest: int) -> int:
        """Bytes of a block where the longest member has `longest`: all are padded to the same."""
        count = -(-longest // self.blocks)
        return count if self.parity == 1 else -(-count // WORD) * WORD

    def stripe(self, position: int, block: int) -> int:
        """The stripe in which a member's block lies."""
        return (block + position + 1) % self.members

    def block(self, stripe: int, position: int) -> int | None:
        """Which block a member gives to a stripe; None where it holds parity of it."""
        found = (stripe - position - 1) % self.members
        return found if found < self.blocks else None

    def holder(self, stripe: int, number: int) -> int:
        """The member that holds parity `number` of a stripe."""
        return (stripe + number) % self.members

    def encode(self, pieces: Sequence[Bytes], number: int) -> Bytes:
        """Parity `number` of the same range of a stripe's blocks, which are given by the number of the block."""
        if self.parity == 1:
            return functools.reduce(np.bitwise_xor, pieces)
        fragments = _driver(self.blocks, self.parity).encode(b"".join(piece.tobytes() for piece in pieces))
        return np.frombuffer(fragments[self.blocks + number], np.uint8)[-len(pieces[0]) :]

    def decode(self, pieces: Mapping[int, Bytes], wanted: int) -> Bytes:
        """A range of block `wanted` of a stripe from as many other pieces; parity q goes by the number blocks + q."""
        if self.parity == 1:
            return functools.reduce(np.bitwise_xor, pieces.values())
        size = len(next(iter(pieces.values())))
        frames = _frames(self.blocks, self.parity, size)
        framed = [frames[number] + piece.tobytes() for number, piece in pieces.items()]
        whole = _driver(self.blocks, self.parity).decode(framed)
        return np.frombuffer(whole, np.uint8)[wanted * size : (wanted + 1) * size]


@functools.cache
def _driver(blocks: int, parity: int) -> Any:
    try:
        from pyeclib.ec_iface import ECDriver
    except ImportError:
        raise InputError("More than one node lost at once (parity > 1) needs pyeclib: pip install 'cairn-lm[parity]'.") from None
    return ECDriver(k=blocks, m=parity, ec_type="liberasurecode_rs_vand")


@functools.lru_cache(8)
def _frames(blocks: int, parity: int, size: int) -> list[bytes]:
    """What the library puts before each piece; it depends on the piece's number and length, not on what is in it."""
    return [fragment[: len(fragment) - size] for fragment in _driver(blocks, parity).encode(bytes(blocks * size))]
