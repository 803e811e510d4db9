"""TIES: trim small changes, elect a sign for every weight, merge the changes that agree with it.

    tau^_i  = tau_i where |tau_i| is among its largest, else 0                          (trim)
    s       = sign(sum_i w_i tau^_i)                                                    (elect)
    tau     = sum over {i : sign(tau^_i) = s} of w_i tau^_i  [ / sum of those w_i ]     (disjoint merge)
    theta   = theta_0 + scale * tau

A sum of exactly zero elects plus.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from cairn.catalog import Paper, register
from cairn.checkpoint.operating.walk import TensorSlice, Walk
from cairn.merging.arithmetic import Based, task_vectors
from cairn.merging.coefficients import Range, at
from cairn.merging.methods.task_arithmetic import added
from cairn.merging.order_statistics import order_statistics


def trim(vectors: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Rows (N, items) with every item below its row's threshold (N,) in magnitude set to zero."""
    # Shrinkage keeps what is strictly larger: the next number below a threshold keeps the threshold itself.
    below = torch.nextafter(thresholds.to(vectors.dtype), torch.zeros((), dtype=vectors.dtype)).tolist()
    return torch.stack([F.hardshrink(row, each) for row, each in zip(vectors, below, strict=True)])


def disjoint(vectors: torch.Tensor, weights: torch.Tensor, mean: bool) -> torch.Tensor:
    """Sum or weighted mean (items,) over the rows that have the elected sign; the rows are weighted already, `weights` is (N, 1)."""
    elected = torch.copysign(torch.ones((), dtype=vectors.dtype), vectors.sum(0))
    agreeing = (vectors * elected).relu_()  # the magnitudes of what agrees, zero elsewhere
    total = agreeing.sum(0) * elected
    if not mean:
        return total
    divisor = (agreeing.sign_() * weights).sum(0)
    return total / divisor.masked_fill_(divisor == 0, 1.0)


def kept_from(density: float, items: int) -> int:
    """The rank, counted from 0 upwards, of the smallest of the `density` share of `items` magnitudes; at least one is kept."""
    return items - max(1, int(density * items))


def trim_thresholds(walk: Walk, density: float) -> torch.Tensor:
    """The smallest magnitude (N,) that each expert keeps over a walk."""
    if density >= 1 or not walk.items:
        return torch.zeros(len(walk.parents) - 1)
    rank = kept_from(density, walk.items)
    found = order_statistics(walk, lambda piece: task_vectors(piece.inputs).abs_(), [[rank]] * (len(walk.parents) - 1))
    return torch.tensor([row[0] for row in found], dtype=torch.float64)


@register("operation", "ties", paper=Paper("TIES-Merging: Resolving Interference When Merging Models", "arXiv:2306.01708"))
class Ties(Based):
    """Trim, elect sign and merge (algorithm 1)."""

    space: ClassVar[dict[str, Range]] = {"scale": Range(0.2, 3.0, factors=True), "density": Range(0.1, 1.0)}

    density: float = Field(0.2, gt=0, le=1)
    """Share of the changes that each expert keeps, the largest ones."""
    scope: Literal["tensor", "model"] = "tensor"
    """Whether the largest are found within each tensor or over the whole model."""
    aggregate: Literal["mean", "sum"] = "mean"
    """Mean or sum of the changes that agree in sign."""

    def whole_model(self) -> bool:
        return self.scope == "model" and self.density < 1

    def survey(self, walk: Walk) -> torch.Tensor:
        return trim_thresholds(walk, self.density)

    def blend(self, piece: TensorSlice, known: torch.Tensor | None) -> torch.Tensor:
        vectors = task_vectors(piece.inputs)
        if known is not None:
            vectors = trim(vectors, known)
        vector = disjoint(self.weighted(piece.name, vectors), self.column(piece.name, vectors), self.aggregate == "mean")
        return added(piece.inputs[0], vector, at(self.scale, piece.name))
