"""Spherical interpolation between two checkpoints, tensor by tensor.

    theta = sin((1-t) w) / sin w * theta_1 + sin(t w) / sin w * theta_2,   w the angle between the two tensors

Where the two lie on a line (|cos w| > 0.9995) the interpolation is linear.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch

from cairn.catalog import Paper, register
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating.stream import Surveyed
from cairn.checkpoint.operating.walk import TensorSlice, Walk
from cairn.errors import InputError
from cairn.merging.coefficients import Coefficient, Range, at, check_patterns

STRAIGHT = 0.9995
"""Cosine from which two tensors count as lying on a line."""


def arc(t: float, cosine: float) -> tuple[float, float]:
    """The factors of the two ends at a share t of the arc between unit vectors of that cosine."""
    if abs(cosine) > STRAIGHT:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def cosine_of(walk: Walk) -> float:
    """Cosine of the angle between two tensors, in float64; 1 where one of them is zero."""

    def products(piece: TensorSlice) -> torch.Tensor:
        a, b = (tensor.double() for tensor in piece.inputs)
        return torch.stack([a @ b, a @ a, b @ b])

    total = sum(walk.map(products), torch.zeros(3, dtype=torch.float64))
    dot, first, second = total.tolist()
    return max(-1.0, min(1.0, dot / math.sqrt(first * second))) if first * second else 1.0


@register("operation", "slerp", paper=Paper("Animating rotation with quaternion curves", "10.1145/325165.325242"))
class Slerp(Surveyed):
    """Spherical interpolation between two checkpoints, tensor by tensor."""

    space: ClassVar[dict[str, Range]] = {"t": Range(0.0, 1.0)}

    t: Coefficient = 0.5
    """Where between the first (0) and the second (1), or patterns of tensor names with a place each."""

    def check(self, parents: Sequence[Checkpoint]) -> None:
        if len(parents) != 2:
            raise InputError(f"slerp lies between two checkpoints, and {len(parents)} were given.")
        super().check(parents)
        check_patterns("t", self.t, [name for name, tensor in parents[0].tensors.items() if tensor.dtype.is_floating_point])

    def survey(self, walk: Walk) -> float:
        return cosine_of(walk)

    def blend(self, piece: TensorSlice, known: float) -> torch.Tensor:
        first, second = arc(at(self.t, piece.name), known)
        return (piece.inputs[0] * first).add_(piece.inputs[1], alpha=second)
