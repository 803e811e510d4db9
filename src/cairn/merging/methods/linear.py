"""A weighted sum of checkpoints.

theta = w_1 theta_1 + ... + w_n theta_n,   with the w divided by their sum unless `normalize` is off
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from cairn.catalog import Paper, register
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating.stream import Tensorwise
from cairn.errors import InputError
from cairn.merging.coefficients import Range, Weights, at, check_patterns, check_weights


def weighted_sum(inputs: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Sum of w_i * x_i over tensors of one shape and floating dtype, in their order."""
    total = inputs[0] * weights[0]
    for other, weight in zip(inputs[1:], weights[1:], strict=True):
        total.add_(other, alpha=weight)
    return total


@register(
    "operation",
    "linear",
    paper=Paper("Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time", "arXiv:2203.05482"),
)
class LinearMerge(Tensorwise):
    """Weighted sum of the weights of any number of checkpoints."""

    elementwise: ClassVar[bool] = True
    space: ClassVar[dict[str, Range]] = {"weights": Range(0.0, 1.0, each=True)}

    weights: Weights | None = None
    """One per checkpoint, or patterns of tensor names with such a list each; default: all equal."""
    normalize: bool = True
    """Divide the weights by their sum."""

    def check(self, parents: Sequence[Checkpoint]) -> None:
        super().check(parents)
        check_weights("weights", self.weights, len(parents), "checkpoints")
        check_patterns("weights", self.weights, [name for name, tensor in parents[0].tensors.items() if tensor.dtype.is_floating_point])
        lists = list(self.weights.values()) if isinstance(self.weights, dict) else [self.weights or [1.0]]
        if self.normalize and any(sum(weights) == 0 for weights in lists):
            raise InputError("the weights sum to zero and so cannot be normalised; set normalize=false if that is meant.")

    def combine(self, name: str, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        weights = [1.0] * len(inputs) if self.weights is None else at(self.weights, name)
        total = sum(weights) if self.normalize else 1.0
        return weighted_sum(inputs, [weight / total for weight in weights])
