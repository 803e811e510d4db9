"""The uniform mean of checkpoints.

    theta = (theta_1 + ... + theta_n) / n

of the last checkpoints of one run (checkpoint or stochastic weight averaging) or of several runs (a uniform soup).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cairn.catalog import Paper, register
from cairn.merging.heads import Averaged

MANY = 100
"""Beyond so many checkpoints the roundings of a float32 sum begin to show."""


def mean(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean of tensors of one shape and floating dtype, summed in their order; in float64 where they are more than a hundred."""
    total = inputs[0].to(torch.float64, copy=True) if len(inputs) > MANY else inputs[0].clone()
    for other in inputs[1:]:
        total += other
    return total.div_(len(inputs))


@register("operation", "average", paper=Paper("Averaging Weights Leads to Wider Optima and Better Generalization", "arXiv:1803.05407"))
class Average(Averaged):
    """Uniform mean of the weights of any number of checkpoints (section 3.1)."""

    def mean_of(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return mean(inputs)
