"""Callbacks: what must happen at a moment of training.

A callback's options build a handler; the handler is called after updates and at the end. A handler that has state
returns it from `state` (small, plain values) or `tensors` (named tensors): both go into the checkpoint and come back
before the first step of a resumed run, so that a callback survives a kill like everything else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cairn.options import Amount, Options, PositiveAmount

if TYPE_CHECKING:
    import torch

    from cairn.training.context import Moment, TrainingContext


class Handler:
    """What a callback does. All methods are optional."""

    def begin(self) -> None:
        """Called once before the first step, when the state of the run is there. May refuse it with an error."""

    def before_clip(self) -> None:
        """Called on every rank when the gradients of the global batch are ready, before their norm is taken."""

    def after_update(self, moment: Moment) -> dict[str, Any] | None:
        """Called after every update on every rank, before its state is saved; what it changes is saved with it. Figures join the row of the step."""
        return None

    def observes(self, moment: Moment) -> bool:
        """Whether `observe` is to be called at this moment: a measurement or a sample is due."""
        return False

    def observe(self, moment: Moment) -> dict[str, Any] | None:
        """Look at the state of a step once it has been handed over for saving, and change nothing of it; figures join the step's row. Called
        again after a resume if the process was lost in between."""
        return None

    def state(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        return {}

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Named tensors for the checkpoint."""
        return {}

    def awaited(self, state: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
        """Tensors like those that `restore` will be given with `state`; by default those of `tensors`."""
        return self.tensors()

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` and `tensors` gave. Called once, before the first step."""


class Callback(Options, ABC):
    """Base of all callbacks' options."""

    catalog_kind: ClassVar[str] = "callback"

    def needs(self) -> frozenset[str]:
        """What the field of the run has to give (tokens, images, labels); nothing by default."""
        return frozenset()

    @abstractmethod
    def handler(self, trainer: TrainingContext) -> Handler:
        """The handler of this callback in this run."""


class PeriodicCallback(Callback):
    """Base of callbacks that happen every so often, and at the end of the run."""

    every: PositiveAmount = Amount(10, "%")

    def due(self, moment: Moment, trainer: TrainingContext) -> bool:
        """Whether the callback happens at this moment."""
        steps = max(1, self.every.steps(trainer.recipe.training.batch, trainer.recipe.total_units))
        return moment.last or moment.step % steps == 0
