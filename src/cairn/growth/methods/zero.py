"""G_zero: new parts that hand on nothing, so that the function stays.

depth   an added layer is a copy whose attention and MLP end in zeros: x + 0 + 0
width   what is added to the residual stream, and what added heads and units hand on, is zero; what they read is drawn at random

A norm over f times as many items, of which only the old ones are not zero, finds an f-th of the mean square: its weight is
multiplied by sqrt(1/f) and its epsilon by 1/f, which gives the old values again. Queries and keys that are normalised
too see no new items: they are multiplied by sqrt(1/f), as their norm's epsilon is by 1/f.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from cairn.catalog import register
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating.stream import copied, piecewise
from cairn.growth.body import Body, body_of
from cairn.growth.frame import DeeperAndWider, Target, drawn, outputs_zeroed, row_blocks, rows_of
from cairn.growth.methods.stack import PAPER

WRITERS = ("o", "down", "embedding")
"""Matrices whose outputs reach the residual stream."""


def norm_share(width: int, mask: float) -> float:
    """Factor of the weights of norms over the residual stream, whose added items are scaled by `mask`: sqrt(1/f) at 0, 1 at 1."""
    return math.sqrt(1 / width + (1 - 1 / width) * mask)


def bordered(rows: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    """Rows (R, C) with new columns (R, c) to their right."""
    return torch.cat([rows, more], dim=1)


@register("growth", "zero", paper=PAPER)
class Zero(DeeperAndWider):
    """Deeper or wider by parts that hand on nothing at first: the function stays (section 3, G_zero)."""

    sample_options: ClassVar[dict[str, Any]] = {"factor": 2, "width": 2}

    seed: int = Field(0, ge=0)
    """Seed of what new heads and units read (width)."""

    def mask_of_new(self) -> float:
        """By what the values are multiplied that new parts hand on."""
        return 0.0

    def check(self, parents: Sequence[Checkpoint]) -> None:
        super().check(parents)
        body_of(parents[0]).refuse_open()

    def config(self, parents: Sequence[Checkpoint]) -> dict[str, Any]:
        config = super().config(parents)
        return config | ({"rms_norm_eps": config["rms_norm_eps"] / self.width} if self.width > 1 else {})

    def values(self, target: Target, parent: Checkpoint, known: Any) -> Iterator[torch.Tensor]:
        yield from self.masked(target, parent, self.mask_of_new())

    def masked(self, target: Target, parent: Checkpoint, mask: float) -> Iterator[torch.Tensor]:
        """The values of a tensor if what new parts hand on is multiplied by `mask`."""
        body, tensor, spaces = body_of(parent), parent.tensors[target.source], target.place.spaces
        if target.added and outputs_zeroed(target, body):
            yield from self.closing(target, body, mask)
        elif self.width == 1 or not any(spaces):
            yield from copied(tensor)
        elif len(spaces) == 1:
            yield self._vector(rows_of(tensor, 0, tensor.shape[0]), target, body, mask)
        else:
            yield from self._matrix(target, parent, mask)

    def closing(self, target: Target, body: Body, mask: float) -> Iterator[torch.Tensor]:
        """What ends an added layer."""
        for begin, end in piecewise(target.spec):
            yield torch.zeros(end - begin)

    def _vector(self, values: torch.Tensor, target: Target, body: Body, mask: float) -> torch.Tensor:
        part, more = target.place.part, (self.width - 1) * len(values)
        if part in ("norm", "final_norm"):
            return torch.cat([values, torch.ones(more)]) * norm_share(self.width, mask)
        if part in ("q_norm", "k_norm"):
            return values.repeat(self.width)
        values = values * self._scale(part.removesuffix(".bias"), body)
        return values.repeat(self.width) if part in ("q.bias", "k.bias") and body.normed_over_heads else torch.cat([values, torch.zeros(more)])

    def _scale(self, part: str, body: Body) -> float:
        return math.sqrt(1 / self.width) if part in ("q", "k") and body.normed else 1.0

    def _matrix(self, target: Target, parent: Checkpoint, mask: float) -> Iterator[torch.Tensor]:
        """The old matrix in the upper left corner, new columns to its right, new rows below."""
        body, tensor, (grows_down, grows_right) = body_of(parent), parent.tensors[target.source], target.place.spaces
        part, (rows, columns) = target.place.part, tensor.shape
        scale, factor = self._scale(part, body), (mask if part in WRITERS else 1.0)
        wide = columns * (self.width if grows_right else 1)
        for begin, end in row_blocks(rows, wide):
            old = rows_of(tensor, begin, end) * scale
            yield (bordered(old, self._new((end - begin, wide - columns), target, body, factor, "right", begin)) if grows_right else old).reshape(-1)
        for copy in range(1, self.width if grows_down else 1):
            for begin, end in row_blocks(rows, wide):
                if part in ("q", "k") and body.normed_over_heads:
                    # A norm over all heads would change with heads of other values: these begin as copies, to which nothing listens.
                    more = self._new((end - begin, wide - columns), target, body, factor, "right", begin)
                    yield bordered(rows_of(tensor, begin, end) * scale, more).reshape(-1)
                else:
                    yield self._new((end - begin, wide), target, body, factor, "below", copy, begin).reshape(-1)

    def _new(self, shape: tuple[int, int], target: Target, body: Body, factor: float, *where: str | int) -> torch.Tensor:
        if not factor:
            return torch.zeros(shape)
        return drawn(shape, float(body.config.get("initializer_range") or 0.02), self.seed, target.spec.name, *where) * factor
