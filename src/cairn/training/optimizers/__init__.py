"""Optimizers: how gradients change the weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from cairn.options import Options

if TYPE_CHECKING:
    import torch


class Optimizer(Options, ABC):
    """Base of all optimizers' options; `build` makes the torch optimizer."""

    catalog_kind: ClassVar[str] = "optimizer"

    lr: float = Field(6e-4, gt=0)
    """Learning rate at factor 1 of the schedule."""

    @abstractmethod
    def build(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """The torch optimizer over the parameters of a model that are trained. Each group holds its full learning rate as `base_lr`, which the loop
        multiplies by the schedule's factor before every update."""


def embeddings(model: torch.nn.Module) -> set[torch.nn.Parameter]:
    """The parameters that are looked up or added as they are, by what holds them, whatever their name: tables of tokens, of positions and of
    relative distances, and parameters that no layer multiplies by (a class token)."""
    from torch import nn

    found: set[nn.Parameter] = set()
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            found.update(own.values())
        elif any(True for _ in module.children()):
            found.update(parameter for parameter in own.values() if parameter.dim() >= 3)
    return found
