"""Exponential average of checkpoints in the order in which they are given.

avg <- beta * avg + (1 - beta) * theta_i,   beginning with theta_1
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from cairn.catalog import Paper, register
from cairn.merging.coefficients import Range
from cairn.merging.heads import Averaged
from cairn.merging.methods.linear import weighted_sum


def decay_weights(count: int, beta: float) -> list[float]:
    """The weights of `count` checkpoints, oldest first; they sum to one."""
    return [beta ** (count - 1)] + [(1 - beta) * beta ** (count - 1 - i) for i in range(1, count)]


@register("operation", "ema", paper=Paper("Free Lunch: Robust Cross-Lingual Transfer via Model Checkpoint Averaging", "arXiv:2305.16834", card=9))
class Ema(Averaged):
    """Exponential average of checkpoints, the last one counting most."""

    space: ClassVar[dict[str, Range]] = {"beta": Range(0.0, 0.98)}

    beta: float = Field(0.5, ge=0, lt=1)
    """What the average keeps of itself at each further checkpoint."""

    def mean_of(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return weighted_sum(inputs, decay_weights(len(inputs), self.beta))
