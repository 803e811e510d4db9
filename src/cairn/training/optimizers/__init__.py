"""Optimizers: how gradients change the weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
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
    def build(self, parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
        """The torch optimizer over named parameters. Each group holds its full learning rate as `base_lr`, which the loop
        multiplies by the schedule's factor before every update."""
