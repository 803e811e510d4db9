"""Order statistics of a walk: exact, in memory that does not grow with the number of items.

A sample brackets the wanted rank, one pass counts what lies below the bracket and collects what lies inside, and the
value is the right one of those. A bracket that holds too much is narrowed by a sample of its own contents, one that
missed is widened: the answer is always the one that sorting everything would give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from cairn.checkpoint.operating.walk import TensorSlice, Walk
from cairn.errors import InputError

LIMIT = 2**20
"""Values of one bracket that are collected."""
SPREAD = 8.0
"""Standard deviations of a sampled rank by which a bracket reaches to either side."""

Rows = Callable[[TensorSlice], torch.Tensor]


@dataclass
class _Bracket:
    """A wanted rank among all items, and the closed interval of values in which it must lie."""

    rank: int
    low: float = -math.inf
    high: float = math.inf
    expected: float = math.inf
    """About how many items lie inside."""
    answer: float | None = None
    held: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """Values collected so far, its first `collected` items: one block that grows, for many small ones would scatter over the heap."""
    collected: int = 0
    below: int = 0
    inside: int = 0

    @property
    def stride(self) -> int:
        return max(1, math.ceil(self.expected / LIMIT))

    def take(self, row: torch.Tensor) -> tuple[int, int, torch.Tensor]:
        """Of one piece: how many lie below, how many inside, and every `stride`-th of those."""
        if self.low == -math.inf and self.high == math.inf:
            return 0, row.numel(), row[:: self.stride].clone()
        values = row.numpy()  # counting and picking by a mask is several times faster there
        below = 0 if self.low == -math.inf else int(np.count_nonzero(values < self.low))
        found = values[(values >= self.low) & (values <= self.high)]
        return below, len(found), torch.from_numpy(found[:: self.stride].copy() if self.stride > 1 else found)

    def add(self, below: int, inside: int, values: torch.Tensor) -> None:
        """Count what `take` found."""
        self.below += below
        self.inside += inside
        end = self.collected + values.numel()
        if end > self.held.numel():
            grown = torch.empty(max(2 * end, 2**14), dtype=values.dtype)
            grown[: self.collected] = self.held[: self.collected]
            self.held = grown
        self.held[self.collected : end] = values
        self.collected = end

    def narrow(self, sample: torch.Tensor, within: int, behind: int) -> None:
        """Bracket the rank by a sample of the `within` items that lie in the present bracket, `behind` lying below it."""
        count = sample.numel()
        share = (self.rank - behind) / max(within, 1)
        middle, reach = share * count, SPREAD * math.sqrt(count * share * (1 - share)) + 2 * SPREAD
        first, last = math.floor(middle - reach), math.ceil(middle + reach)
        ordered = sample.sort().values
        self.low = float(ordered[first]) if first > 0 else self.low
        self.high = float(ordered[last]) if last < count - 1 else self.high
        self.expected = within * min(1.0, (min(last, count) - max(first, 0)) / count)

    def settle(self, items: int) -> None:
        """Draw the conclusion of a whole pass over `items` items."""
        if self.rank < self.below:
            self.low, self.high, self.expected = -math.inf, self.low, float(self.below)
        elif self.rank >= self.below + self.inside:
            self.low, self.high, self.expected = self.high, math.inf, float(items - self.below - self.inside)
        elif self.low == self.high:
            self.answer = self.low
        else:
            values = self.held[: self.collected]
            if values.numel() == self.inside:
                self.answer = float(values.kthvalue(self.rank - self.below + 1).values)
            else:
                self.narrow(values, self.inside, self.below)
        self.held, self.collected, self.below, self.inside = torch.empty(0), 0, 0, 0


def order_statistics(walk: Walk, rows: Rows, ranks: Sequence[Sequence[int]]) -> list[list[float]]:
    """For each row that `rows` makes of a piece (R, items), the values at its `ranks` among all items, counted from 0 upwards.

    Raises `InputError` where an item is not a number.
    """
    brackets = [[_Bracket(rank, expected=walk.items) for rank in row] for row in ranks]
    if walk.items > LIMIT:
        sample = min(LIMIT, max(2**14, walk.items // 256))
        drawn = torch.cat([rows(piece) for piece in walk.sample(sample)], dim=1)
        for row, line in zip(brackets, drawn, strict=True):
            for bracket in row:
                bracket.narrow(line, walk.items, 0)
    while any(bracket.answer is None for row in brackets for bracket in row):
        for piece in walk.map(lambda piece: _taken(rows(piece), brackets)):
            for bracket, below, inside, values in piece:
                bracket.add(below, inside, values)
        for row in brackets:
            for bracket in row:
                if bracket.answer is None:
                    bracket.settle(walk.items)
    return [[float(bracket.answer or 0.0) for bracket in row] for row in brackets]


def _taken(rows: torch.Tensor, brackets: Sequence[Sequence[_Bracket]]) -> list[tuple[_Bracket, int, int, torch.Tensor]]:
    if not bool(torch.isfinite(rows.sum())):
        raise InputError("A checkpoint holds values that are not finite, so its values cannot be ranked; `cairn verify` and `cairn diff` look closer.")
    return [(bracket, *bracket.take(line)) for line, row in zip(rows, brackets, strict=True) for bracket in row if bracket.answer is None]
