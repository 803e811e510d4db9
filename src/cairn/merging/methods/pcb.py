"""Parameter competition balancing: every weight of every expert gets its own coefficient.

    a_i     = |tau_i| clamped to its own order statistics at eps and 1 - eps,    c_i = sign(tau_i) a_i
    intra_i = exp(N * minmax(a_i)^2)                                                   large inside its task
    inter_i = tanh(tau_i * sum_j tau_j)                                                in agreement with the others
    beta_i  = intra_i * inter_i
    s_i     = minmax(max(beta_i, its order statistic at 1 - keep))                     drop the lowest, rescale the rest
    theta   = theta_0 + scale * sum_i w_i s_i c_i / sum_i s_i

Order statistics, minimum and maximum are of the whole model. The variants are those of the authors' code: `nlp` and
`vision` clamp at eps = 0.01, `vision` compares with sum_j minmax(a_j) sign(tau_j), and `pairwise` takes
inter_i = sum_j tanh(u_i u_j) with u = minmax(a) sign(tau), which does not depend on the size of the task vectors.
A weight whose signs conflict has a negative beta: it is dropped first. One expert alone comes out trimmed, not as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field

from cairn.catalog import Paper, register
from cairn.checkpoint.operating.walk import TensorSlice, Walk
from cairn.merging.arithmetic import Based, task_vectors
from cairn.merging.coefficients import Range, at
from cairn.merging.methods.task_arithmetic import added
from cairn.merging.order_statistics import order_statistics

Variant = Literal["reference", "nlp", "vision", "pairwise"]
EPS = {"reference": 1e-4, "nlp": 0.01, "vision": 0.01, "pairwise": 1e-4}


@dataclass(frozen=True)
class ScoreBounds:
    """What is known of the whole model, one number per expert: the clamps of |tau|, and where beta is cut and ends."""

    low: torch.Tensor
    high: torch.Tensor
    cut: torch.Tensor | None = None
    top: torch.Tensor | None = None


def minmax(values: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Rows (N, items) brought from [low, high] to [0, 1]; zero where the two are equal."""
    width = (high - low)[:, None]
    return (values - low[:, None]) / width.masked_fill(width <= 0, math.inf)


def magnitudes(vectors: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """|tau| (N, items) clamped to [low, high], step 1."""
    return vectors.abs().clamp(low[:, None], high[:, None])


def balance(vectors: torch.Tensor, low: torch.Tensor, high: torch.Tensor, variant: Variant) -> torch.Tensor:
    """beta (N, items) of task vectors (N, items), steps 2 to 4."""
    shares = minmax(magnitudes(vectors, low, high), low, high)
    intra = torch.exp(len(vectors) * shares.square())
    if variant == "pairwise":
        signed = vectors.sign() * shares
        inter = sum((torch.tanh(signed * other) for other in signed), torch.zeros_like(signed))
    elif variant == "vision":
        inter = torch.tanh(vectors * (vectors.sign() * shares).sum(0))
    else:
        inter = torch.tanh(vectors * vectors.sum(0))
    return intra * inter


def weighted_mean(vectors: torch.Tensor, beta: torch.Tensor, bounds: ScoreBounds, weights: torch.Tensor) -> torch.Tensor:
    """The merged vector (items,), steps 5 and 6; `weights` is (N, 1)."""
    assert bounds.cut is not None and bounds.top is not None
    scores = minmax(beta.clamp(min=bounds.cut[:, None]), bounds.cut, bounds.top)
    clamped = vectors.sign() * magnitudes(vectors, bounds.low, bounds.high)
    return (scores * clamped * weights).sum(0) / scores.sum(0).clamp(min=1e-12)


@register("operation", "pcb", paper=Paper("Parameter Competition Balancing for Model Merging", "arXiv:2410.02396", card=66))
class Pcb(Based):
    """Balance the competition of weights within and between experts (section 3)."""

    space: ClassVar[dict[str, Range]] = {"scale": Range(0.2, 3.0, factors=True), "keep": Range(0.1, 1.0)}

    keep: float = Field(0.1, gt=0, le=1)
    """Share of the weights that each expert keeps, those of the highest beta."""
    variant: Variant = "reference"
    """Which form of clamping and of agreement."""
    eps: float | None = Field(None, ge=0, lt=0.5)
    """Share of magnitudes that is clamped at either end; default: the variant's own."""

    def whole_model(self) -> bool:
        return True

    def survey(self, walk: Walk) -> ScoreBounds:
        count, items = len(walk.parents) - 1, walk.items
        eps = EPS[self.variant] if self.eps is None else self.eps
        ends = [int(items * eps), max(0, int(items * (1 - eps) - 1))]
        clamps = _columns(order_statistics(walk, lambda piece: task_vectors(piece.inputs).abs_(), [ends] * count))
        bounds = ScoreBounds(*clamps)
        wanted = [min(int(items * (1 - self.keep)), items - 1), items - 1]
        return ScoreBounds(*clamps, *_columns(order_statistics(walk, lambda piece: self._beta(piece, bounds), [wanted] * count)))

    def blend(self, piece: TensorSlice, known: ScoreBounds) -> torch.Tensor:
        vectors = task_vectors(piece.inputs)
        vector = weighted_mean(vectors, self._beta(piece, known), known, self.column(piece.name, vectors))
        return added(piece.inputs[0], vector, at(self.scale, piece.name))

    def _beta(self, piece: TensorSlice, bounds: ScoreBounds) -> torch.Tensor:
        return balance(task_vectors(piece.inputs), bounds.low, bounds.high, self.variant)


def _columns(found: Sequence[Sequence[float]]) -> list[torch.Tensor]:
    return [torch.tensor(column) for column in zip(*found, strict=True)]
