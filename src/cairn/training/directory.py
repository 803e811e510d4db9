"""The directory of a run: `recipe.yaml` (as resolved), `metrics.jsonl`, `samples.jsonl` and `checkpoints/step-00000500/`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cairn.checkpoint.format import read
from cairn.checkpoint.format.manifest import MANIFEST
from cairn.checkpoint.format.place import is_store, place, set_aside
from cairn.checkpoint.format.read import CHECKPOINTS, Checkpoint
from cairn.checkpoint.format.sound import check, newest_sound
from cairn.errors import DamagedError, InputError, NotFoundError, ResumeError
from cairn.training import loggers
from cairn.training import recipe as recipes
from cairn.training.recipe import Recipe


@dataclass(frozen=True)
class Run:
    """A run directory."""

    path: Path

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe as the run last used it."""
        return recipes.load(self.path / "recipe.yaml")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; of a run of several stages the rows of each, with its name under `stage`."""
        if read.has_stages(self.path):
            named = [(stage.name.partition("-")[2], Run(stage)) for stage in read.list_stages(self.path)]
            return [{"stage": name, **row} for name, run in named for row in run.metrics()]
        return list(loggers.read_rows(self.path / loggers.METRICS))

    def samples(self) -> list[dict[str, Any]]:
        """What the model wrote as it learned."""
        return list(loggers.read_rows(self.path / loggers.SAMPLES))

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return read.list_checkpoints(self.path)

    def newest(self) -> Checkpoint:
        """The newest complete checkpoint. Raises `NotFoundError` if there is none."""
        paths = self.checkpoints()
        if not paths:
            raise NotFoundError(f"The run {self.path} has no complete checkpoint yet.")
        return read.open(paths[-1])


def refuse_used(path: Path, recipe: Recipe) -> None:
    if is_store(path):
        raise InputError(f"{path} is in a store, and a run's own files grow line by line: name a plain directory and set checkpoint.store={path}.")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} is not empty; a new run needs a new directory (`cairn resume {path}` continues the run in it).")
    if recipe.checkpoint.store is not None and read.list_checkpoints(recipe.checkpoint.store):
        raise InputError(f"{recipe.checkpoint.store} holds the checkpoints of another run; a new run needs a place of its own (checkpoint.store=URL).")


def refuse_foreign(path: Path, recipe: Recipe) -> None:
    """Of a run that was lost before its first checkpoint there is nothing to keep; whatever else lies in `path` is not touched."""
    if not (path / "recipe.yaml").exists():
        refuse_used(path, recipe)


def refuse_damage(checkpoint: Checkpoint) -> None:
    """Raise `DamagedError`, which names the newest sound checkpoint, unless every byte is what was written. Each process reads its share."""
    rank, size = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
    report = check(checkpoint.path, share=(rank, size))
    if not report.sound:
        raise DamagedError(f"{checkpoint.path} is damaged: {report.damage[0]}.{read.way_on(read.older_than(checkpoint.path))}")


def set_damaged_aside(checkpoint: Checkpoint) -> None:
    """Move newer checkpoints that are damaged out of the way of what is written next. Raises `ResumeError` where a newer one is sound."""
    path = checkpoint.path.resolve()
    newer = [other for other in read.list_checkpoints(path.parent.parent) if int(other.name.removeprefix("step-")) > int(path.name.removeprefix("step-"))]
    sound = newest_sound(newer)
    if sound is not None:
        raise ResumeError(f"{checkpoint.path} is not the newest checkpoint of its run ({sound.name} is); use `cairn fork` to branch off from it.")
    for other in newer:
        set_aside(other)


def set_unfinished_aside(home: Path) -> None:
    """Move steps without a manifest out of the way: readers do not see them, and nothing could be published under their names."""
    for path in sorted(home.glob("step-*")):
        if path.is_dir() and not (path / MANIFEST).exists():
            set_aside(path)


def run_of(checkpoint: Checkpoint, named: str | Path) -> Path:
    path = checkpoint.path.resolve().parent.parent
    if checkpoint.path.resolve().parent.name != CHECKPOINTS:
        raise ResumeError(f"{checkpoint.path} does not lie in a run directory; use `cairn fork` to begin a new run from it.")
    if not is_store(path):
        return path
    if is_store(place(named)):
        raise ResumeError(f"{checkpoint.path} is in a store; name the directory of its run on this machine: cairn resume {path} --run DIR.")
    return place(named)


def recipe_of(checkpoint: Checkpoint) -> Recipe:
    options = checkpoint.lineage.options if checkpoint.lineage is not None else {}
    if "recipe" not in options:
        raise ResumeError(f"{checkpoint.path} does not say with which recipe it was trained; `cairn fork` takes one: cairn fork CKPT RECIPE --run DIR.")
    return recipes.load(options["recipe"])
