"""The whole state of a run as named tensors and plain values, to a checkpoint and back.

`model` and `optimizer` tensors go under the names of DESIGN 3 (`<parameter>/exp_avg`); everything small goes into
trainer.json. Restoring takes all of it or refuses and says what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field

from cairn import catalog
from cairn.checkpoint.format import documents, kinds
from cairn.checkpoint.format.documents import as_json
from cairn.checkpoint.format.dtypes import MASTER
from cairn.checkpoint.format.lazy import LazyTensor
from cairn.checkpoint.format.parts import local_of
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.saving.captured import NamedState
from cairn.checkpoint.saving.modules import fill, fill_optimizer, optimizer_tensors
from cairn.errors import DamagedError, ResumeError
from cairn.training.context import Progress, TrainingContext

FORMAT = 1


class _Read(kinds.Feed):
    """What it must say of the data."""

    stores: dict[str, str]
    mixture: Annotated[kinds.Mixture, Field(min_length=1)]


class _Trained(kinds.Trainer):
    """What trainer.json must say for a run to go on."""

    position: kinds.Whole
    feed: _Read


def callback_names(trainer: TrainingContext) -> list[str]:
    """A stable name for each callback of the run: its catalog name, numbered where it appears more than once."""
    names: list[str] = []
    for callback in trainer.recipe.callbacks:
        name = catalog.name_of(callback) or type(callback).__name__
        names.append(name if name not in names else f"{name}-{names.count(name) + 1}")
    return names


def callback_tensors(trainer: TrainingContext) -> dict[str, torch.Tensor]:
    """`<callback>/<tensor>` for every tensor that a callback keeps."""
    pairs = zip(callback_names(trainer), trainer.handlers, strict=True)
    return {f"{callback}/{name}": tensor for callback, handler in pairs for name, tensor in handler.tensors().items()}


def plain_state(trainer: TrainingContext) -> dict[str, Any]:
    """What trainer.json holds. Nothing in it depends on the clock or on the machine: equal states give equal bytes."""
    progress = trainer.progress
    return {
        "format": FORMAT,
        "step": progress.step,
        trainer.recipe.unit: progress.units,
        "position": progress.position,
        "skipped": progress.skipped,
        "feed": trainer.feed.state(progress.position),
        "callbacks": {name: handler.state() for name, handler in zip(callback_names(trainer), trainer.handlers, strict=True)},
        **({"teachers": trainer.teachers.state()} if trainer.teachers else {}),
        **({"learned": trainer.learned.state()} if trainer.learned else {}),
    }


def describe(trainer: TrainingContext) -> NamedState:
    """The state as it stands, for a saver: live tensors under their Hugging Face names (a tied head is left out, as transformers
    does) and the small files. What callbacks keep changes only after an update, like the weights."""
    named = trainer.trained.parameters()
    live = {name: parameter.detach() for name, parameter in named.items()}
    lower = trainer.trained.lowered()
    masters = {f"{name}/{MASTER}": live[name] for name in lower if named[name].requires_grad}
    groups = {
        trainer.trained.stem: {name: live[name].to(lower[name]) if name in lower else live[name] for name in live},
        "optimizer": optimizer_tensors((named | trainer.learned.named()).items(), [trainer.optimizer]) | masters,
        "ingredients": callback_tensors(trainer) | trainer.teachers.tensors() | trainer.learned.tensors(),
    }
    small = {**trainer.trained.documents(), "trainer.json": plain_state(trainer)}
    files = {**trainer.carried, **{name: as_json(document) for name, document in small.items()}, **trainer.preprocessor.files()}
    return NamedState(groups, files)


def restore(trainer: TrainingContext, checkpoint: Checkpoint, *, fresh_optimizer: bool = False, new_data: bool = False) -> None:
    """Put the state of `checkpoint` into `trainer`.

    `fresh_optimizer` leaves the moments at zero, `new_data` starts the feed at its beginning; both must be asked for.
    Raises `ResumeError` when something that a resume needs is not in the checkpoint, `MismatchError` when shapes differ.
    """
    plain = checkpoint.trainer
    if plain is None:
        raise ResumeError(f"{checkpoint.path} has no trainer.json, so it cannot be resumed; `cairn fork` starts a new run from its weights.")
    documents.validated(_Trained, plain, checkpoint.path / "trainer.json")
    if plain.get(trainer.recipe.unit) is None:
        raise DamagedError(f"{checkpoint.path / 'trainer.json'} does not say after how many {trainer.recipe.unit} it was written.")
    load_weights(trainer, checkpoint)
    if not fresh_optimizer:
        restore_optimizer(trainer, checkpoint)
    if not new_data:
        trainer.feed.restore(plain["feed"])
    trainer.progress = Progress(plain["step"], plain[trainer.recipe.unit], 0 if new_data else plain["position"], plain.get("skipped", 0))
    _restore_callbacks(trainer, checkpoint, plain.get("callbacks", {}))
    trainer.teachers.restore(checkpoint)
    trainer.learned.restore(checkpoint)


def load_weights(trainer: TrainingContext, checkpoint: Checkpoint) -> None:
    """Copy the weights of `checkpoint` into the model; names and shapes must agree."""
    trainer.trained.load(checkpoint)


def restore_optimizer(trainer: TrainingContext, checkpoint: Checkpoint) -> None:
    """Put the optimizer's state of `checkpoint` into `trainer`. Raises `ResumeError` where there is none, or not of all parameters."""
    if checkpoint.optimizer is None and not trainer_has_updated(checkpoint):
        return  # the very beginning: there are no moments yet
    if checkpoint.optimizer is None:
        raise ResumeError(
            f"{checkpoint.path} holds no optimizer state, and continuing without it makes the loss jump; "
            "ask for a fresh optimizer by name (--fresh optimizer) if that is what you want."
        )
    moments = {name: tensor for name, tensor in checkpoint.optimizer.items() if not name.endswith(f"/{MASTER}")}
    _restore_masters(trainer, checkpoint)
    learned = trainer.learned.named() if trainer.learned.known_to(checkpoint) else {}
    missing = sorted(fill_optimizer(trainer.optimizer, trainer.trained.parameters() | learned, moments))
    if missing and trainer_has_updated(checkpoint):
        raise ResumeError(f"{checkpoint.path}: the optimizer state of {len(missing)} parameters is missing, the first is '{missing[0]}'.")


def _restore_masters(trainer: TrainingContext, checkpoint: Checkpoint) -> None:
    """Give the model the float32 weights that those of the checkpoint were rounded from. Raises `ResumeError` where they are not."""
    kept: Mapping[str, LazyTensor] = checkpoint.optimizer or {}
    for name, parameter in trainer.trained.parameters().items():
        if (master := kept.get(f"{name}/{MASTER}")) is None:
            continue
        weights, stored = torch.empty_like(parameter, requires_grad=False), checkpoint.stored[name].dtype
        fill(weights, master)
        if not torch.equal(local_of(weights).to(stored), local_of(parameter.detach()).to(stored)):
            raise ResumeError(
                f"{checkpoint.path}: '{name}' is not what the optimizer's weights round to, so it was changed behind the run; "
                "ask for a fresh optimizer by name (--fresh optimizer) to go on from the weights as they are."
            )
        parameter.detach().copy_(weights)


def trainer_has_updated(checkpoint: Checkpoint) -> bool:
    """Whether any update had been made when the checkpoint was written (a step-0 checkpoint has no moments yet)."""
    plain = checkpoint.trainer or {}
    return plain.get("step", 0) > plain.get("skipped", 0)


def _restore_callbacks(trainer: TrainingContext, checkpoint: Checkpoint, states: Mapping[str, Any]) -> None:
    kept = checkpoint.ingredients
    for name, handler in zip(callback_names(trainer), trainer.handlers, strict=True):
        if name not in states:
            continue  # a callback that the resumed recipe adds begins afresh; lineage records the change
        tensors, awaited = {}, handler.awaited(states[name])
        for key, like in awaited.items():
            if kept is not None and f"{name}/{key}" in kept:
                tensors[key] = torch.empty_like(like)
                fill(tensors[key], kept[f"{name}/{key}"])
        missing = sorted(set(awaited) - set(tensors))
        if missing:
            raise ResumeError(f"{checkpoint.path}: callback '{name}' kept no tensor '{missing[0]}', so it cannot go on exactly.")
        handler.restore(states[name], tensors)
