"""Model Stock: how far to go from the base towards the mean of experts, from the angle between what they learned.

cos  = mean over pairs of experts of cos(tau_i, tau_j)
t    = N cos / (1 + (N - 1) cos)
theta = theta_0 + t * mean_i tau_i
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from cairn.catalog import Paper, register
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating.walk import TensorSlice, Walk
from cairn.errors import InputError
from cairn.merging.arithmetic import Based, task_vectors
from cairn.merging.coefficients import at
from cairn.merging.methods.task_arithmetic import added

SMALLEST = 1e-6
"""Norm products and denominators below this count as this, or as zero: no angle can be told there."""


def ratio(products: torch.Tensor) -> float:
    """t of the inner products (N, N) of the task vectors; 0 where it is not defined."""
    count = len(products)
    norms = products.diagonal().sqrt()
    cosines = (products / (norms[:, None] * norms[None]).clamp(min=SMALLEST)).clamp(-1, 1)
    above = torch.triu_indices(count, count, offset=1)
    cosine = float(cosines[above[0], above[1]].mean())
    denominator = 1 + (count - 1) * cosine
    return 0.0 if abs(denominator) < SMALLEST else count * cosine / denominator


@register("operation", "model-stock", paper=Paper("Model Stock: All we need is just a few fine-tuned models", "arXiv:2403.19522"))
class ModelStock(Based):
    """Between base and mean of experts, tensor by tensor, as the angle between the experts says (equation 2)."""

    sample_parents: ClassVar[int] = 3

    def check(self, parents: Sequence[Checkpoint]) -> None:
        if len(parents) < 3:
            raise InputError("model-stock measures the angle between experts: give the base and at least two experts.")
        if self.weights is not None:
            raise InputError("model-stock takes the plain mean of experts and has no use for weights.")
        super().check(parents)

    def survey(self, walk: Walk) -> float:
        def products(piece: TensorSlice) -> torch.Tensor:
            vectors = task_vectors(piece.inputs).double()
            return vectors @ vectors.T

        count = len(walk.parents) - 1
        return ratio(sum(walk.map(products), torch.zeros(count, count, dtype=torch.float64)))

    def blend(self, piece: TensorSlice, known: float) -> torch.Tensor:
        return added(piece.inputs[0], task_vectors(piece.inputs).mean(0), known * at(self.scale, piece.name))
