"""Width by splitting units into equal copies, which share what they hand on.

W'[i', j'] = W[i' mod R, j' mod C] / f    where columns are inputs; copies read the same, so that each hands on a f-th

Heads are copied whole, so that rope and groups of keys stay right. RMS norms see the same values f times over, and so
do not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field

from cairn.catalog import Paper, register
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating.stream import copied
from cairn.growth.body import body_of
from cairn.growth.frame import Growth, Target, drawn, row_blocks, rows_of
from cairn.growth.methods.stack import PAPER

READERS = ("q", "k", "v", "gate", "up")


def split_rows(rows: torch.Tensor, copies: int, share: float) -> torch.Tensor:
    """Rows (R, C) over `copies` times as many columns, each copy of a column times `share`: (R, copies * C)."""
    return rows.repeat(1, copies) * share


@register(
    "growth", "split", paper=(PAPER, Paper("Net2Net: Accelerating Learning via Knowledge Transfer", "arXiv:1511.05641"), Paper("bert2BERT", "arXiv:2110.07143"))
)
class SplitGrowth(Growth):
    """Wider by copies of every unit and head, whose shares add up: the function stays (Net2Wider; G_direct in width)."""

    width: int = Field(2, ge=1)
    """How many times as wide: hidden size, MLP and heads; the size of a head stays."""
    noise: float = Field(0.0, ge=0)
    """Spread of what is added to the copies' own weights, relative to theirs. Exact copies have equal gradients and would stay equal
    for ever; 0 keeps the function to rounding."""
    seed: int = Field(0, ge=0)

    def widening(self) -> int:
        return self.width

    def values(self, target: Target, parent: Checkpoint, known: Any) -> Iterator[torch.Tensor]:
        tensor, spaces = parent.tensors[target.source], target.place.spaces
        over_rows = self.width if spaces[0] else 1
        if not any(spaces):
            yield from copied(tensor)
        elif len(spaces) == 1:
            share = 1 / self.width if target.place.part == "final_norm" and body_of(parent).tied else 1.0  # a tied head has no share of its own
            yield (rows_of(tensor, 0, tensor.shape[0]) * share).repeat(over_rows)
        else:
            over_columns = self.width if spaces[1] else 1
            share = 1.0 if target.place.part == "embedding" else 1 / over_columns
            for copy in range(over_rows):
                for begin, end in row_blocks(tensor.shape[0], tensor.shape[1] * over_columns):
                    rows = split_rows(rows_of(tensor, begin, end), over_columns, share)
                    yield self._stirred(rows, target, copy, begin).reshape(-1)

    def _stirred(self, rows: torch.Tensor, target: Target, copy: int, begin: int) -> torch.Tensor:
        if not self.noise or not copy or target.place.part not in READERS:
            return rows
        return rows + drawn(rows.shape, self.noise * float(rows.std()), self.seed, target.spec.name, copy, begin)
