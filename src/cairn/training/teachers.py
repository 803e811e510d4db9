"""Teachers: models beside the one that trains, whose outputs an objective learns from.

A frozen teacher is a checkpoint: the old model of a compatible update, a larger model to distil from, a reference. A moving one is an
exponential average of the student's own weights, kept in the checkpoints of the run. An objective says which teachers it knows by name;
the recipe names their checkpoints under `teacher`; what they say of a micro-batch is in the batch, as `teacher.NAME`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cairn.checkpoint.format import adapter, descent, read
from cairn.checkpoint.format.lineage import Parent
from cairn.checkpoint.format.parts import local_of
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.saving.modules import fill, fill_all
from cairn.errors import InputError, MismatchError, NotFoundError, ResumeError
from cairn.models.foreign import trainable
from cairn.training.trained import Trained, trained_by

if TYPE_CHECKING:
    from cairn.training.context import TrainingContext
    from cairn.training.recipe import Recipe

Opened = Mapping[str, Checkpoint | None]
"""The checkpoints of teachers by name; None for one that begins as the student."""
KEY = "teachers"
"""Under which trainer.json and lineage speak of them, and where their tensors lie among the ingredients."""


def open_teachers(recipe: Recipe, parent: Checkpoint | None, preprocessor: Any, *, resumed: bool) -> dict[str, Checkpoint | None]:
    """The checkpoints of a recipe's teachers by name; None for one that begins as the student.

    Where one has moved, the parent's lineage helps to find it. Raises `InputError` for a run instead of a checkpoint, `NotFoundError`,
    `MismatchError` for a teacher with another vocabulary, `ResumeError` if a resumed run was taught by another model.
    """
    opened: dict[str, Checkpoint | None] = {}
    for name, teacher in recipe.teacher.items():
        opened[name] = None if teacher.checkpoint is None else _open(teacher.checkpoint, _told(parent, name), parent)
        if (checkpoint := opened[name]) is None:
            continue
        _refuse_other_words(checkpoint, recipe, preprocessor)
        before = (((parent.trainer or {}) if parent is not None else {}).get(KEY) or {}).get(name)
        if resumed and before not in (None, checkpoint.model_digest):
            raise ResumeError(f"The run was taught by the model {before[:12]}, and {checkpoint.path} is the model {checkpoint.model_digest[:12]}.")
    return opened


class Teachers:
    """The teachers of a run in memory."""

    def __init__(self, context: TrainingContext, checkpoints: Opened) -> None:
        """Build them; those that follow the student take its weights in `begin`, unless `restore` has given them theirs."""
        self._context, self._checkpoints = context, dict(checkpoints)
        self._models: dict[str, nn.Module] = {}
        self._following: dict[str, tuple[float, Trained]] = {}
        self._restored: set[str] = set()
        for name, teacher in context.recipe.teacher.items():
            checkpoint = self._checkpoints[name]
            if teacher.ema is not None:
                self._models[name], part = _like_the_student(context)
                self._following[name] = teacher.ema, part
            else:
                assert checkpoint is not None
                model = checkpoint.model(device=context.world.device)
                self._models[name] = model if hasattr(model, "architecture") else trainable(model)
            self._models[name].requires_grad_(False).eval()

    def __bool__(self) -> bool:
        return bool(self._models)

    @property
    def models(self) -> Mapping[str, nn.Module]:
        """The models that teach, by name."""
        return self._models

    @torch.no_grad()
    def said(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What each teacher says of a micro-batch, as `teacher.NAME`."""
        objective = self._context.recipe.objective
        found = {f"teacher.{name}": objective.said(model, batch) for name, model in self._models.items()}
        for name in self._following:
            # A sharded model stays whole after a forward pass that no backward pass follows; its average moves and is saved as shards.
            getattr(self._models[name], "reshard", lambda: None)()
        return found

    @torch.no_grad()
    def begin(self) -> None:
        """Called when the student has its weights: a teacher that follows it begins there, or where its checkpoint is."""
        student = self._context.trained
        own = {id(parameter) for parameter in student.parameters().values()}
        for name, (_, part) in self._following.items():
            theirs = part.parameters()
            for (_, mine), (_, copy) in zip(self._context.model.named_parameters(), self._models[name].named_parameters(), strict=True):
                if id(mine) not in own or name not in self._restored:
                    local_of(copy).copy_(local_of(mine))
            checkpoint = self._checkpoints[name]
            if checkpoint is not None and name not in self._restored:
                fill_all(theirs, checkpoint.stored, f"weights of the teacher {checkpoint.path}")

    @torch.no_grad()
    def follow(self) -> None:
        """Called after an update: teachers that follow the student move towards it."""
        student = self._context.trained.parameters()
        for decay, part in self._following.values():
            for name, average in part.parameters().items():
                if student[name].requires_grad:
                    local_of(average).lerp_(local_of(student[name]), 1 - decay)

    def state(self) -> dict[str, Any]:
        """Plain values for trainer.json: which model taught, by its digest; None for one that began as the student."""
        return {name: None if checkpoint is None else checkpoint.model_digest for name, checkpoint in self._checkpoints.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps: of teachers that follow the student the same part as of the student."""
        return {f"{KEY}/{name}/{key}": parameter.detach() for name, (_, part) in self._following.items() for key, parameter in part.parameters().items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take back what `tensors` gave. A teacher that the checkpoint does not know begins afresh. Raises `ResumeError` where part is missing."""
        known = (checkpoint.trainer or {}).get(KEY) or {}
        kept: Mapping[str, Any] = checkpoint.ingredients or {}
        for key, tensor in self.tensors().items():
            name = key.split("/")[1]
            if name not in known:
                continue
            if key not in kept:
                raise ResumeError(f"{checkpoint.path} holds no '{key}', so its teacher cannot go on exactly.")
            fill(tensor, kept[key])
            self._restored.add(name)

    def lineage(self, directory: Path) -> dict[str, Any]:
        """What lineage says of them: digests, and where they lay."""
        named = {name: adapter.base_hint(checkpoint, directory) for name, checkpoint in self._checkpoints.items() if checkpoint is not None}
        return {KEY: named} if named else {}


def _like_the_student(context: TrainingContext) -> tuple[nn.Module, Trained]:
    """A second model of the student's kind, laid out over the processes as the student is."""
    part = trained_by(context.recipe)
    dtype = next(iter(context.model.parameters())).dtype
    model = context.world.place(context.recipe.model.meta_model().to(dtype), part.enter).to_empty(device=context.world.device)
    context.recipe.model.initialize(model, 0)
    return model, part


def _open(path: str, told: Parent | None, parent: Checkpoint | None) -> Checkpoint:
    try:
        if read.list_checkpoints(path):
            raise InputError(f"{path} is a run, whose newest checkpoint may change; name one of its checkpoints as a teacher.")
        return read.open(path)
    except NotFoundError:
        found = descent.find(told, parent.path) if told is not None and parent is not None else None
        if found is None:
            raise
        return found


def _told(parent: Checkpoint | None, name: str) -> Parent | None:
    """What the lineage of the checkpoint that a run goes on from says of a teacher."""
    options = parent.lineage.options if parent is not None and parent.lineage is not None else {}
    told = (options.get(KEY) or {}).get(name)
    return Parent(digest=told["digest"], path=told["path"], step=told.get("step")) if isinstance(told, dict) and "digest" in told and "path" in told else None


def _refuse_other_words(teacher: Checkpoint, recipe: Recipe, preprocessor: Any) -> None:
    """What a teacher says is compared id by id, so its ids must mean the same."""
    theirs, ours = teacher.config.get("vocab_size"), getattr(recipe.model, "vocab_size", None)
    if theirs is not None and ours is not None and theirs != ours:
        raise MismatchError(f"{teacher.path} has {theirs} ids, the model in training {ours}; teachers need its tokenizer.")
    words = [getattr(each, "backend", None) for each in (preprocessor, teacher.tokenizer)]
    if None not in words and words[0].get_vocab(with_added_tokens=True) != words[1].get_vocab(with_added_tokens=True):  # type: ignore[union-attr]
        raise MismatchError(f"{teacher.path} has another vocabulary than the model in training; teachers need its tokenizer.")
