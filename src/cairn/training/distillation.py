"""What a student learns from a teacher, as pure functions on logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of two sets of logits (..., V) over the last dimension, in float32 or float64; no factor for the temperature."""
    p, q = ((logits if logits.dtype.itemsize == 8 else logits.float()).div(temperature).log_softmax(-1) for logits in (teacher, student))
    return (p.exp() * (p - q)).sum(-1)


def distilled(teacher: Tensor, student: Tensor, targets: Tensor, share: float, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each position (B, T) from logits (B, T, V) and targets (B, T), and its two parts: cross-entropy and divergence.

    (1 - share) * cross-entropy + share * temperature^2 * KL(teacher || student), where temperature^2 keeps the size of the gradient
    ("Distilling the Knowledge in a Neural Network", 1503.02531, section 2).
    """
    wide = student if student.dtype.itemsize == 8 else student.float()
    entropy = F.cross_entropy(wide.transpose(1, 2), targets, reduction="none")
    apart = divergence(teacher, student, temperature)
    return (1 - share) * entropy + share * temperature**2 * apart, entropy, apart
