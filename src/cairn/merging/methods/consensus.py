"""Consensus merging: keep the weights of a merged task vector that enough experts need.

    theta = theta_0 + scale * [sum_i m_i >= min_tasks] * tau_M

`min_tasks` 1 drops what no expert needs, 2 also what only one needs, 0 gives task arithmetic or TIES back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from cairn.catalog import Paper, register
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating.walk import TensorSlice
from cairn.errors import InputError
from cairn.merging.arithmetic import task_vectors
from cairn.merging.coefficients import Range, at
from cairn.merging.localize import Localizing
from cairn.merging.methods.task_arithmetic import added


@register("operation", "consensus", paper=Paper("Localizing Task Information for Improved Model Merging and Compression", "arXiv:2405.07813", card=26))
class Consensus(Localizing):
    """Merge only the weights that at least `min_tasks` experts need (section 4.2)."""

    space: ClassVar[dict[str, Range]] = {"scale": Range(0.05, 1.5, factors=True), "thresholds": Range(0.2, 0.6)}

    min_tasks: int = Field(2, ge=0)
    """How many experts must need a weight."""

    def check(self, parents: Sequence[Checkpoint]) -> None:
        if self.weights is not None:
            raise InputError("consensus counts experts and has no use for weights; see task-arithmetic.")
        super().check(parents)

    def blend(self, piece: TensorSlice, known: torch.Tensor | None) -> torch.Tensor:
        vectors = task_vectors(piece.inputs)
        merged = self.merged(vectors, known)
        needed = self.masks(vectors, merged).sum(0) >= self.min_tasks
        return added(piece.inputs[0], merged * needed, at(self.scale, piece.name))
