"""What an objective learns beside the model: a projection of hidden states, for example. It trains by the same optimizer, lies among the
ingredients of a checkpoint, and never in the weights that other programs open.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.saving.modules import fill
from cairn.errors import ResumeError

if TYPE_CHECKING:
    from cairn.training.parallel import World

KEY = "learned"
"""Under which trainer.json, the ingredients and the batch speak of it."""


class Learned:
    """The numbers that an objective learns, by name; every process has all of them."""

    def __init__(self, first: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, world: World) -> None:
        """With their first values; the optimizer moves them at its own rate and lets none of them decay."""
        self._world = world
        self.parameters = {name: nn.Parameter(value.to(world.device)) for name, value in first.items()}
        if self.parameters:
            rate = optimizer.param_groups[0]["base_lr"]
            optimizer.add_param_group({"params": list(self.parameters.values()), "weight_decay": 0.0, "base_lr": rate})

    def __bool__(self) -> bool:
        return bool(self.parameters)

    def inputs(self) -> dict[str, torch.Tensor]:
        """As the objective finds them in a batch."""
        return {f"{KEY}.{name}": parameter for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def share(self) -> None:
        """Add up the gradients over the processes, as those of the model are."""
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                whole = self._world.device_sums(parameter.grad.double()) / self._world.gradient_factor
                parameter.grad.copy_(whole)

    def named(self) -> dict[str, nn.Parameter]:
        """By the names under which the optimizer's state of them is kept."""
        return {f"{KEY}.{name}": parameter for name, parameter in self.parameters.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps among its ingredients."""
        return {f"{KEY}/{name}": parameter.detach() for name, parameter in self.parameters.items()}

    def known_to(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint says that its run learned all of these; otherwise they begin afresh."""
        said: Any = (checkpoint.trainer or {}).get(KEY) or []
        return bool(self.parameters) and set(self.parameters) <= set(said)

    def state(self) -> list[str]:
        """Plain values for trainer.json: the names."""
        return sorted(self.parameters)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take back what `tensors` gave. Raises `ResumeError` where the checkpoint says that it is there and part is missing."""
        if not self.known_to(checkpoint):
            return
        kept: Mapping[str, Any] = checkpoint.ingredients or {}
        for key, tensor in self.tensors().items():
            if key not in kept:
                raise ResumeError(f"{checkpoint.path} holds no '{key}', which the objective had learned, so it cannot go on exactly.")
            fill(tensor, kept[key])
