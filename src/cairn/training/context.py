"""What a run in memory shows to its parts: callbacks, reweighting, snapshots and the saving of state see a `TrainingContext`, never the loop.

The loop (`cairn.training.loop.Trainer`) is one; a test may give another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

    from cairn.checkpoint.format.read import Checkpoint
    from cairn.data.order.feed import Feed
    from cairn.training.fields import Preprocessor
    from cairn.training.learned import Learned
    from cairn.training.loggers import Logger
    from cairn.training.parallel import World
    from cairn.training.recipe import Recipe
    from cairn.training.trained import Trained


@dataclass
class Progress:
    """How far a run is. `units` are those of the field (tokens, samples); `position` is the next sample of the feed's global order; `skipped`
    counts updates left out."""

    step: int = 0
    units: int = 0
    position: int = 0
    skipped: int = 0


@dataclass
class Moment:
    """Where the run stands when a callback is called: after the update that made `step`."""

    step: int
    units: int
    last: bool
    interrupted: bool = False


class Later(Mapping[str, float]):
    """Figures that are asked of the device when somebody reads them, and not before: a step does not wait for numbers that nobody wants.

    Where several processes add them up, all of them read the figures of a step, or none does.
    """

    def __init__(self, ask: Callable[[], Mapping[str, float]]) -> None:
        self._ask, self._found = ask, dict[str, float]()
        self._known = False

    def _figures(self) -> dict[str, float]:
        if not self._known:
            self._found, self._known = dict(self._ask()), True
        return self._found

    def __getitem__(self, name: str) -> float:
        return self._figures()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._figures())

    def __len__(self) -> int:
        return len(self._figures())


@dataclass
class MicroBatch:
    """The inputs of one forward pass on this rank."""

    inputs: dict[str, torch.Tensor]
    weight: float
    sources: np.ndarray
    """The number of each sample's source in the feed."""
    samples: np.ndarray
    """The places of its samples in the global order."""


class Stateful(Protocol):
    """What keeps something between steps: it gives it to every checkpoint and takes it back before the first step of a resumed run."""

    def state(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Named tensors for the checkpoint."""

    def awaited(self, state: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
        """Tensors like those that `restore` will be given with `state`."""

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` and `tensors` gave."""


class Beside(Protocol):
    """The teachers of a run, as its state sees them: `cairn.training.teachers.Teachers`."""

    def __bool__(self) -> bool:
        """Whether there are any."""

    def state(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Named tensors for the checkpoint."""

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take back what `tensors` gave."""


class TrainingContext(Protocol):
    """A run in memory, as its parts see it."""

    recipe: Recipe
    """Pinned: every amount in the unit of the field."""
    preprocessor: Preprocessor
    carried: Mapping[str, bytes]
    """Files that travel with the weights besides those of the preprocessor: a chat template, generation settings."""
    feed: Feed
    world: World
    logger: Logger
    progress: Progress
    model: torch.nn.Module
    trained: Trained
    """What of the model trains, and so what its checkpoints hold."""
    learned: Learned
    """What the objective learns beside the model."""
    optimizer: torch.optim.Optimizer

    @property
    def teachers(self) -> Beside:
        """The models beside the one that trains, from whose outputs the objective learns."""

    @property
    def handlers(self) -> Sequence[Stateful]:
        """What the callbacks of the recipe keep, in their order."""

    @property
    def forward(self) -> torch.nn.Module:
        """The module that computes losses: the model, compiled and shared with other ranks as the recipe says."""

    def micro_batches(self, position: int) -> list[MicroBatch]:
        """This rank's micro-batches of the update that begins at `position`, on the CPU."""

    def gradients(self, micro_batches: list[MicroBatch]) -> tuple[torch.Tensor, Mapping[str, float]]:
        """Accumulate the gradient of the global batch; its mean loss, still on the device, and further figures."""

    def moved(self, micro_batch: MicroBatch) -> dict[str, torch.Tensor]:
        """The inputs of a micro-batch where the model computes."""

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The arithmetic of a forward pass, as the recipe says."""

    def evaluating(self) -> contextlib.AbstractContextManager[dict[str, Any]]:
        """The model as a measurement sees it: no gradients, no training behaviour; restored afterwards."""

    def change_mixture(self, weights: Mapping[str, float]) -> None:
        """Mix the sources by `weights` from the next update on."""
