"""Training the stages of a recipe, one after the other, and going on with them after a kill."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml

from cairn.checkpoint.format import documents, read
from cairn.checkpoint.format.compare import keys_that_differ
from cairn.checkpoint.format.manifest import MANIFEST
from cairn.checkpoint.format.place import is_store
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating.stream import apply
from cairn.checkpoint.saving.write import sweep
from cairn.errors import InputError, ResumeError
from cairn.models.config import architecture
from cairn.training import execution
from cairn.training import recipe as recipes
from cairn.training.directory import Run, owned, recipe_of, refuse_used
from cairn.training.forking import of_source
from cairn.training.parallel import World, joined, started_again
from cairn.training.recipe import Recipe, Stage
from cairn.training.sources import name_data
from cairn.training.stages import RECIPE, Done, Step, finished_stage, operation_of, plan, resolved

MAY_CHANGE = ("parallel.", "fault_tolerance.", "training.micro_batch", "training.log_every", "training.non_finite")
"""What may be changed for all stages to come when a run of several goes on: how it is executed, not what it computes."""


def execute(recipe: Recipe, path: Path, *, stop_at_step: int | None = None, go_on: bool = False, quiet: bool = True) -> Run:
    """Train all stages of `recipe` into `path`; `stop_at_step` ends this process in the first stage that reaches that step.

    With `go_on`, or when torchrun has started the processes again, what is there already is left as it is. Raises
    `InputError` before anything is made, `ResumeError` if `path` holds another recipe.
    """
    if is_store(path):
        raise InputError(f"{path} is in a store, and a run's own files grow line by line: name a plain directory and set checkpoint.store={path}.")
    steps = plan(recipe)
    for step in steps:
        name_data(step.recipe.data)
    there = (path / RECIPE).exists()
    if there and (go_on or started_again()):
        different = next(iter(keys_that_differ(recipes.load(path / RECIPE).plain(), recipe.plain()).items()), None)
        if different is not None:
            raise ResumeError(f"{path} holds a run of another recipe ({different[0]} differs); give the recipe of that one, or another --run.")
    else:
        refuse_used(path, recipe)
    return _executed(recipe, steps, path, [], stop_at_step, quiet)


def go_on(
    path: Path, overrides: Iterable[str] = (), *, stop_at_step: int | None = None, fresh: Iterable[str] = (), exact: bool = False, quiet: bool = True
) -> Run:
    """Go on with the stages in `path` where they stopped. `overrides` may say how (`MAY_CHANGE`), not what.

    Raises `ResumeError` for what would make the stages to come other ones.
    """
    changes = list(overrides)
    strange = next((item.partition("=")[0] for item in changes if not item.startswith(MAY_CHANGE)), "--fresh" if list(fresh) else None)
    if strange is not None:
        raise ResumeError(
            f"{path} has several stages, and {strange} cannot be changed for all of them on the way; resume one stage "
            f"({path}/{read.STAGES}/N-NAME) with it, or branch off with `cairn fork`."
        )
    recipe = recipes.load(path / RECIPE)
    return _executed(recipe, plan(recipe), path, changes, stop_at_step, quiet, exact)


def _executed(recipe: Recipe, steps: list[Step], path: Path, changes: list[str], stop_at_step: int | None, quiet: bool, exact: bool = False) -> Run:
    # One process group for all stages: it cannot be met again under the same name.
    with joined(steps[0].recipe.overridden(changes)) as world:
        if world.first:
            _begin(recipe, path)
            sweep(path / read.STAGES)
        world.barrier()
        with owned(path):
            _each(recipe, steps, path, changes, world, stop_at_step, quiet, exact)
    return Run(path)


def _each(recipe: Recipe, steps: list[Step], path: Path, changes: list[str], world: World, stop_at_step: int | None, quiet: bool, exact: bool) -> None:
    """Every stage in turn, as far as it is not done yet."""
    done: dict[str, Done] = {}
    for step in steps:
        place_of = path / read.STAGES / step.folder
        parents = [done[name] for name in step.stage.parents]
        if step.stage.checkpoint is not None:
            done[step.stage.name] = Done(read.open(step.stage.checkpoint), step.recipe, step.rate)
        elif step.stage.operation is not None:
            if world.first and not (place_of / MANIFEST).exists():
                _apply(step.stage, [parent.checkpoint for parent in parents], place_of)
            world.barrier()
            combined = read.open(place_of)
            kept = operation_of(step.stage).continues()
            origin = parents[kept or 0]
            done[step.stage.name] = Done(combined, _of_size(origin.recipe, combined), None if kept is None else origin.rate)
        else:
            made = _trained(recipe, step, place_of, parents, changes, stop_at_step, quiet, exact)
            if made is None:
                return
            done[step.stage.name] = made


def _begin(recipe: Recipe, path: Path) -> None:
    """The directory with its recipe, which is whole or not there."""
    path.mkdir(parents=True, exist_ok=True)
    if not (path / RECIPE).exists():
        documents.keep(path / RECIPE, yaml.safe_dump(recipe.plain(), sort_keys=False))
    (path / read.STAGES).mkdir(exist_ok=True)


def _trained(
    recipe: Recipe, step: Step, folder: Path, parents: list[Done], changes: list[str], stop_at_step: int | None, quiet: bool, exact: bool
) -> Done | None:
    """What a stage that trains leaves behind; begun, gone on with, or found finished. None: stopped on the way."""
    if read.list_checkpoints(folder):
        if (found := finished_stage(folder)) is not None:
            return found
        execution.go_on_with(folder, changes, stop_at_step=stop_at_step, exact=exact, quiet=quiet)
    elif not parents:
        execution.begin(step.recipe.overridden(changes), folder, stop_at_step=stop_at_step, go_on=True, quiet=quiet)
    else:
        source, before, rate = parents[0]
        if stop_at_step is not None and (source.step or 0) >= stop_at_step:
            return None
        asked = of_source(resolved(recipe, step.stage, before, source.units or 0, rate).overridden(changes), source)
        own = recipe_of(source) if source.trainer is not None else None
        execution.branch_off(source, folder, asked, own, fresh=step.stage.fresh, stop_at_step=stop_at_step, again=True, quiet=quiet)
    return finished_stage(folder)


def _of_size(recipe: Recipe, checkpoint: Checkpoint) -> Recipe:
    """The recipe for the model that an operation has made, which may have grown."""
    made = architecture(checkpoint.config)
    kept = {key: getattr(recipe.model, key) for key in type(recipe.model).model_fields if key.startswith("initializer")}
    return recipe.model_copy(update={"model": made.model_copy(update=kept) if type(made) is type(recipe.model) else made})


def _apply(stage: Stage, parents: list[Checkpoint], out: Path) -> None:
    apply(operation_of(stage), parents, out, also={"stage": stage.name})
