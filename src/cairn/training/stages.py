"""Stages: one recipe that trains, branches off and combines, each stage a step of the lineage.

    stages:
      - {name: web}
      - {name: anneal, from: web, set: {training.tokens: 10M, optimizer.lr: now, schedule: {name: linear, start: now}}}
      - {name: other, from: web, set: {..., seed: 1}}
      - {name: soup, from: [anneal, other], operation: average}

A stage with no `operation` is a run: from scratch, or a fork of the last checkpoint of the stage that it begins from, whose
recipe, weights, moments and place in the data it keeps except for what it sets. A stage with one is a checkpoint that the
operation makes; one with a `checkpoint` is there already. Stages lie in `stages/1-web`, `stages/2-anneal`, ... of the run
directory and are what they would be if they had been made one by one; so what is finished is known by looking, and a run
that was killed at any moment goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from cairn.checkpoint.format import read
from cairn.checkpoint.format.manifest import MANIFEST
from cairn.checkpoint.format.place import place
from cairn.checkpoint.format.read import Checkpoint
from cairn.errors import InputError
from cairn.options import Amount, configure, in_unit
from cairn.training import recipe as recipes
from cairn.training.estimate import estimate
from cairn.training.recipe import Recipe, Stage

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Step:
    """A stage as it will be: the recipe of its run (of an operation: that of its first parent, or of the one whose training goes
    on), the tokens (or samples) at which it begins and ends, and what it hands on: the learning rate at which it stands, and whether there is
    an optimizer state."""

    number: int
    stage: Stage
    recipe: Recipe
    begins: int = 0
    ends: int = 0
    rate: float | None = None
    moments: bool = False

    @property
    def folder(self) -> str:
        return f"{self.number}-{self.stage.name}"


class Done(NamedTuple):
    """What a stage has left behind, for those that begin from it."""

    checkpoint: Checkpoint
    recipe: Recipe
    rate: float | None


# -- what each stage will be --------------------------------------------------------------------------------------------


def plan(recipe: Recipe) -> list[Step]:
    """Every stage with its whole recipe; nothing is written. Raises `InputError` that names the stage."""
    steps: dict[str, Step] = {}
    for number, stage in enumerate(recipe.stages, 1):
        parent = steps[stage.parents[0]] if stage.parents else None
        if stage.operation is not None:
            assert parent is not None  # Recipe has looked
            steps[stage.name] = _combining(number, stage, [steps[name] for name in stage.parents])
        elif stage.checkpoint is not None:
            steps[stage.name] = _existing(number, stage, recipe)
        else:
            if parent is not None:
                _refuse_unprepared(stage, parent)
            begins = parent.ends if parent is not None else 0
            asked = resolved(recipe, stage, parent.recipe if parent else None, begins, parent.rate if parent else None)
            steps[stage.name] = Step(number, stage, asked, begins, asked.total_units, asked.pinned().learning_rate(asked.total_units), True)
    counts = {step.recipe.parallel.processes for step in steps.values()}
    if len(counts) > 1:
        raise InputError(f"All stages of a recipe run in the same processes, and parallel.data x shard x tensor is {' here, '.join(map(str, sorted(counts)))}.")
    return list(steps.values())


def _combining(number: int, stage: Stage, parents: list[Step]) -> Step:
    """A stage that an operation makes. Where that keeps the training state of one parent, it stands where this one stood."""
    kept = operation_of(stage).continues()
    if kept is None:
        return Step(number, stage, parents[0].recipe)
    if bare := next((parent.stage.name for parent in parents if not parent.moments), None):
        raise InputError(f"stage '{stage.name}' is to keep optimizer state, and '{bare}' leaves none.")
    return Step(number, stage, parents[kept].recipe, parents[kept].ends, parents[kept].ends, parents[kept].rate, True)


def _existing(number: int, stage: Stage, whole: Recipe) -> Step:
    """A stage that a checkpoint takes the place of, as though its recipe had made it. The rate at which it stands is that of its own
    recipe; where that is not known (an import), the rate of this one at its end."""
    opened = read.open(stage.checkpoint or "")
    asked = resolved(whole, stage, None, 0, None).pinned()
    own = (opened.lineage.options if opened.lineage is not None else {}).get("recipe")
    rate = recipes.load(own).learning_rate(opened.units) if own and opened.units else asked.learning_rate(asked.total_units)
    return Step(number, stage, asked, opened.units or 0, opened.units or 0, rate, opened.optimizer is not None)


def _refuse_unprepared(stage: Stage, parent: Step) -> None:
    """Where there is no optimizer state, or no count of progress, what a run that goes on needs must be said."""
    if not parent.moments and "optimizer" not in stage.fresh:
        raise InputError(f"stage '{stage.name}' trains on from '{parent.stage.name}', which leaves no optimizer state: write fresh: [optimizer].")
    if not parent.ends and not any(key == "schedule" or key.startswith("schedule.") for key in stage.settings):
        raise InputError(f"stage '{stage.name}' trains on from '{parent.stage.name}', which leaves no count of its progress: set a schedule of its own.")


def resolved(whole: Recipe, stage: Stage, before: Recipe | None, units: int, rate: float | None) -> Recipe:
    """The recipe of a stage that begins from a checkpoint of `units` tokens (or samples), of the recipe `before`, whose next update would have the
    learning rate `rate`; from scratch they are None and 0."""
    base = before.pinned() if before is not None else whole.model_copy(update={"stages": []})

    def standing() -> float:
        if rate is None:
            raise InputError(f"stage '{stage.name}': optimizer.lr: 'now' speaks of the run that a stage goes on with, and this one goes on with none.")
        return rate

    settings = {key: recipes.with_moment(key, value, units, standing) for key, value in stage.settings.items()}
    if whole.checkpoint.store is not None:
        settings.setdefault("checkpoint.store", f"{whole.checkpoint.store.rstrip('/')}/{stage.name}")
    try:
        asked = base.changed({"stage": stage.name, **settings})
    except InputError as error:
        raise InputError(f"stage '{stage.name}': {str(error).removeprefix('recipe: ')}") from None
    if not stage.parents:
        return asked
    if not any(key in ("training", f"training.{asked.unit}") for key in settings):
        raise InputError(f"stage '{stage.name}' has no length; set training.{asked.unit}, the {asked.unit} (or steps) of this stage alone.")
    return _counted_on(asked, units)


def _counted_on(recipe: Recipe, units: int) -> Recipe:
    """The recipe of a run that goes on from `units`, from one that speaks of this stage alone: its length, its percents."""
    batch, length = recipe.training.batch, recipe.total_units
    parts: dict[str, Any] = {
        "schedule": recipe.schedule.pinned(batch, units + length),
        "checkpoint": _absolute(recipe.checkpoint, batch, length),
        "callbacks": [_absolute(callback, batch, length) for callback in recipe.callbacks],
        "data": recipe.data.counted_on(batch, units, length),
        "training": recipe.training.model_copy(update={recipe.unit: Amount(units + length, recipe.unit)}),
    }
    return cast(Recipe, in_unit(recipe.model_copy(update=parts), recipe.unit))


def _absolute(options: Any, batch: int, length: int) -> Any:
    """A copy whose percents are units, as shares of `length`."""

    def whole(value: Any) -> Any:
        if isinstance(value, list):
            return [whole(item) for item in value]
        return Amount(max(batch, value.units(batch, length)), "") if isinstance(value, Amount) and value.unit == "%" else value

    return options.model_copy(update={key: whole(getattr(options, key)) for key in type(options).model_fields})


def operation_of(stage: Stage) -> Any:
    """The configured operation of a stage."""
    try:
        return configure("operation", stage.operation)
    except InputError as error:
        raise InputError(f"stage '{stage.name}': {error}") from None


def act_of(stage: Stage) -> str:
    """What a stage does, in the words of lineage."""
    if stage.checkpoint is not None:
        return "checkpoint"
    if stage.operation is None:
        return "run: fork" if stage.parents else "run: train"
    return f"operation: {stage.operation['name'] if isinstance(stage.operation, Mapping) else stage.operation}"


def estimates(recipe: Recipe, gpu: str = "h100", gpus: int = 1) -> list[dict[str, Any]]:
    """What each stage does and costs, before anything is started: one row a stage, for `cairn train --dry-run`."""
    rows = []
    for step in plan(recipe):
        row: dict[str, Any] = {"stage": step.stage.name, "from": step.stage.parents, "act": act_of(step.stage)}
        if act_of(step.stage).startswith("run"):
            batch, length = step.recipe.training.batch, step.ends - step.begins
            alone = step.recipe.changed({f"training.{step.recipe.unit}": length})
            pinned = step.recipe.pinned()
            row |= {step.recipe.unit: length, "steps": length // batch, "begins": step.begins}
            row |= {"learning_rate": [pinned.learning_rate(step.begins), pinned.learning_rate(step.ends - batch)]}
            row |= {"sources": {name: source.weight for name, source in step.recipe.data.sources.items()}, "seed": step.recipe.seed}
            row |= {"parameters": step.recipe.model.parameter_count(), "estimated_hours": estimate(alone, gpu, gpus)["estimated_hours"]}
        rows.append(row)
    return rows


# -- how far it is --------------------------------------------------------------------------------------------------------


def progress(path: str | Path) -> list[dict[str, Any]]:
    """Every stage of the run in `path`: what it does, how far it is, its newest checkpoint. Loads nothing heavy."""
    run = place(path)
    return [_standing(run, stage, number) for number, stage in enumerate(recipes.load(run / RECIPE).stages, 1)]


def _standing(run: Path, stage: Stage, number: int) -> dict[str, Any]:
    folder = run / read.STAGES / f"{number}-{stage.name}"
    row: dict[str, Any] = {"stage": stage.name, "from": stage.parents, "act": act_of(stage), "state": "to come"}
    inside = [folder] if (folder / MANIFEST).exists() else read.list_checkpoints(folder)
    if inside or stage.checkpoint is not None:
        newest = read.open(stage.checkpoint or inside[-1])
        finished = not act_of(stage).startswith("run") or finished_stage(folder) is not None
        row |= {"state": "finished" if finished else "under way", "step": newest.step, newest.unit: newest.units}
        row |= {"checkpoint": str(newest.path), "digest": newest.digest}
    elif folder.exists():
        row["state"] = "under way"
    return row


def finished_stage(folder: Path) -> Done | None:
    """What the run in `folder` leaves behind, if it has come to its end."""
    newest = read.open(folder)
    recipe, units = recipes.load(newest.lineage.options["recipe"]) if newest.lineage is not None else None, newest.units or 0
    return Done(newest, recipe, recipe.learning_rate(units)) if recipe is not None and units >= recipe.total_units else None
