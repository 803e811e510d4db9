"""What TALL masks are compared with: masks of the same density that are drawn at random or keep an expert's largest changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from cairn import randomness
from cairn.checkpoint.format.read import Checkpoint

if TYPE_CHECKING:
    from torch import nn


def measured(
    seed: int, base: Checkpoint, experts: Mapping[str, Checkpoint], model: nn.Module, density: Mapping[str, float], share: Callable[[nn.Module, str], float]
) -> dict[str, float]:
    """Mean over experts of `share` of the base plus the summed task vectors under each kind of mask, and under none (`sum`).

    The model's weights are overwritten; `density` is each expert's share of weights that are kept.
    """
    start = flat(base)
    vectors = {name: flat(expert) - start for name, expert in experts.items()}
    merged, found = torch.stack(list(vectors.values())).sum(0), dict[str, list[float]](random=[], magnitude=[], sum=[])
    for number, (name, vector) in enumerate(vectors.items()):
        drawn = torch.from_numpy(randomness.uniform(randomness.seed_for(seed, "mask", number), np.arange(start.numel())))
        masks = {"random": drawn < density[name], "magnitude": largest(vector, density[name]), "sum": torch.ones_like(drawn, dtype=torch.bool)}
        for kind, mask in masks.items():
            load(model, start + merged * mask)
            found[kind].append(share(model, name))
    return {kind: float(np.mean(shares)) for kind, shares in found.items()}


def largest(vector: torch.Tensor, density: float) -> torch.Tensor:
    """The mask (items,) of the `density` largest items of a vector by size."""
    size = vector.abs()
    return size >= size.kthvalue(min(size.numel(), round((1 - density) * size.numel()) + 1)).values


def flat(checkpoint: Checkpoint) -> torch.Tensor:
    """All weights of a small checkpoint as one vector, by name."""
    return torch.cat([checkpoint.tensors[name].load().reshape(-1) for name in sorted(checkpoint.tensors)])


def load(model: nn.Module, vector: torch.Tensor) -> None:
    """Put such a vector into a model."""
    position, state = 0, model.state_dict()
    with torch.no_grad():
        for name in sorted(state):
            state[name].copy_(vector[position : position + state[name].numel()].view(state[name].shape))
            position += state[name].numel()
