"""What a student learns from a teacher, as pure functions on logits and on hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def uniform_layers(student: int, teacher: int) -> list[tuple[int, int]]:
    """Which block of the teacher each block of the student learns from: evenly spaced, the last from the last ("TinyBERT", 1909.10351, section 3.1)."""
    return [(block, -(-(block + 1) * teacher // student) - 1) for block in range(student)]


def state_distance(student: Tensor, teacher: Tensor, projection: Tensor | None = None, *, normalised: bool = False) -> Tensor:
    """Mean squared difference over the last dimension of hidden states, (..., D) and (..., E) to (...), in float32 or float64.

    `projection` (E, D) brings the student's states to the teacher's width ("FitNets", 1412.6550, section 2.2); without it D is E. `normalised`
    divides each state by its root mean square first, so that its direction alone counts.
    """
    mine, theirs = (states if states.dtype.itemsize == 8 else states.float() for states in (student, teacher))
    if projection is not None:
        mine = mine @ projection.to(mine).t()
    if normalised:
        mine, theirs = (states / states.square().mean(-1, keepdim=True).add(1e-12).sqrt() for states in (mine, theirs))
    return (mine - theirs).square().mean(-1)


def plain(model: nn.Module) -> Any:
    """The model inside of what shares or compiles it: what its blocks give is looked at, which compiled code does not show."""
    found: Any = model
    while not hasattr(found, "blocks"):
        found = getattr(found, "_orig_mod", None) or found.module
    return found


def states_of(model: nn.Module, numbers: Sequence[int], call: Callable[[nn.Module], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What `call` gives of a model, and what the blocks of these numbers gave meanwhile, (B, T, D) each."""
    while hasattr(model, "_orig_mod"):
        model = model._orig_mod  # type: ignore[assignment]
    blocks, seen = plain(model).blocks(), dict[int, Tensor]()

    def keep(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            seen[number] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [blocks[number].register_forward_hook(keep(number)) for number in sorted(set(numbers))]
    try:
        logits = call(model)
    finally:
        for handle in hooks:
            handle.remove()
    return logits, [seen[number] for number in numbers]


def width_of(model: nn.Module) -> int:
    """Of the hidden states of a causal language model."""
    from cairn.models.anatomy import anatomy

    whole = plain(model)
    return int(whole.get_parameter(anatomy(whole).embedding).shape[1])


def first_projection(seed: int, wide: int, narrow: int) -> Tensor:
    """(wide, narrow) from N(0, 1 / narrow), by the seed alone."""
    import numpy as np

    from cairn.randomness import normal

    drawn = normal(seed, np.arange(wide * narrow)).reshape(wide, narrow) / narrow**0.5
    return torch.from_numpy(drawn).float()
