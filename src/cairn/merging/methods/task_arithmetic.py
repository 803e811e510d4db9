"""Task arithmetic: experts are added up as vectors.

theta = theta_0 + scale * sum_i w_i (theta_i - theta_0)
"""

from __future__ import annotations

from typing import ClassVar

import torch

from cairn.catalog import Paper, register
from cairn.checkpoint.operating.walk import TensorSlice
from cairn.merging.arithmetic import Based, task_vectors
from cairn.merging.coefficients import Range, at


def added(base: torch.Tensor, vector: torch.Tensor, scale: float) -> torch.Tensor:
    """base + scale * vector."""
    return torch.add(base, vector, alpha=scale)


@register("operation", "task-arithmetic", paper=Paper("Editing Models with Task Arithmetic", "arXiv:2212.04089"))
class TaskArithmetic(Based):
    """Base plus the scaled sum of what the experts learned (section 2)."""

    space: ClassVar[dict[str, Range]] = {"scale": Range(0.05, 1.5, factors=True)}

    def blend(self, piece: TensorSlice, known: object) -> torch.Tensor:
        vectors = self.weighted(piece.name, task_vectors(piece.inputs))
        return added(piece.inputs[0], vectors.sum(0), at(self.scale, piece.name))
