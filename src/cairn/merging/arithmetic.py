"""Task vectors: what experts have learned beyond the base that they were all trained from.

tau_i = theta_i - theta_0,   computed in float32 whatever the checkpoints are stored in
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating.stream import Surveyed
from cairn.checkpoint.operating.walk import Walk
from cairn.errors import InputError, MismatchError
from cairn.merging.coefficients import Coefficient, Weights, at, check_patterns, check_weights


def task_vectors(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows tau_i (N, items) of the base and N experts (items,) each."""
    base, *experts = inputs
    vectors = torch.empty(len(experts), base.numel(), dtype=base.dtype)
    for row, expert in zip(vectors, experts, strict=True):
        torch.sub(expert, base, out=row)
    return vectors


class Based(Surveyed):
    """Base of operations on task vectors: the first parent is the base, the others are experts trained from it."""

    based: ClassVar[bool] = True

    weights: Weights | None = None
    """One per expert, or patterns of tensor names with such a list each; default: all 1."""
    scale: Coefficient = 1.0
    """Factor of the merged task vector, or patterns of tensor names with a factor each."""

    def check(self, parents: Sequence[Checkpoint]) -> None:
        if len(parents) < 2:
            raise InputError("This method merges what experts have learned beyond their common base: give the base and at least one expert.")
        super().check(parents)
        names = [name for name, tensor in parents[0].tensors.items() if tensor.dtype.is_floating_point]
        check_weights("weights", self.weights, len(parents) - 1, "experts")
        check_patterns("weights", self.weights, names)
        check_patterns("scale", self.scale, names)
        for expert in parents[1:]:
            if expert.path.resolve() == parents[0].path.resolve():
                raise MismatchError(f"{expert.path} is given as base and as expert; an expert is another checkpoint, trained from the base.")

    def survey(self, walk: Walk) -> object:
        return None

    def weighted(self, name: str, vectors: torch.Tensor) -> torch.Tensor:
        """The rows times the experts' weights, in place where there are any."""
        return vectors if self.weights is None else vectors.mul_(self.column(name, vectors))

    def column(self, name: str, vectors: torch.Tensor) -> torch.Tensor:
        """The experts' weights for a tensor as a column (N, 1)."""
        weights = [1.0] * len(vectors) if self.weights is None else at(self.weights, name)
        return torch.tensor(weights, dtype=vectors.dtype)[:, None]
