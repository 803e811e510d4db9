"""Runs on disk: start one, resume it, fork a new one from a checkpoint.

A run directory holds `recipe.yaml` (as resolved), `metrics.jsonl`, `samples.jsonl` and `checkpoints/step-00000500/`.
A resume continues a run in its own directory, exactly; a fork begins another run from a checkpoint and may change
data, objective, schedule or optimizer on purpose. Lineage records which, and what was changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from cairn.checkpoint.format import read
from cairn.checkpoint.format.place import place
from cairn.checkpoint.format.read import Checkpoint
from cairn.device import computes
from cairn.errors import InputError
from cairn.training import execution, stage_runs
from cairn.training import recipe as recipes
from cairn.training.directory import Run, recipe_of
from cairn.training.forking import recipe_to_fork
from cairn.training.parallel import started_again
from cairn.training.recipe import Recipe
from cairn.training.sources import name_data

__all__ = ["Run", "fork", "recipe_to_fork", "recipe_to_resume", "resume", "train"]


@computes
def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    run: str | Path,
    overrides: Iterable[str] = (),
    *,
    stop_at_step: int | None = None,
    go_on: bool = False,
    device: Any = None,
    quiet: bool = True,
) -> Run:
    """Train from scratch into the new directory `run`.

    `recipe` is a file, the name of a shipped recipe, a mapping or a `Recipe`; `overrides` are `key=value`.
    `stop_at_step` ends this process early, with a checkpoint, without changing what the run would compute. With `go_on`, and
    whenever `torchrun` has started the processes again because one was lost, a run that is there already goes on from its
    newest complete checkpoint. `device`: as `cairn.device.choose`, a processor or a CUDA device. Raises `InputError` for a bad recipe or a directory that is
    not empty, `ResumeError` if the run that is there is another one, `DivergedError` by the recipe's policy.
    """
    asked, path = recipes.load(recipe, overrides), place(run)
    name_data(asked.data)
    if asked.stages:
        return stage_runs.execute(asked, path, stop_at_step=stop_at_step, go_on=go_on, quiet=quiet)
    return execution.begin(asked, path, stop_at_step=stop_at_step, go_on=go_on, quiet=quiet)


@computes
def resume(
    source: str | Path,
    overrides: Iterable[str] = (),
    *,
    stop_at_step: int | None = None,
    fresh: Iterable[Literal["optimizer"]] = (),
    run: str | Path | None = None,
    base: str | Path | None = None,
    exact: bool = False,
    device: Any = None,
    quiet: bool = True,
) -> Run:
    """Continue a run from its newest complete checkpoint, in its own directory, exactly where it stopped.

    `source` is a run or its newest checkpoint. Where that is in a store, `run` names the run's directory on this machine, which is
    made if it is not there. Everything is restored or `ResumeError` says what is missing; a fresh
    optimizer must be asked for by name. `overrides` may change how the run goes on (length, precision of reports, number
    of processes), not what it is; lineage lists them. What may change bits here (other libraries, another processor, kernels off) is said and
    stands in lineage; with `exact` it is refused. Every byte of the checkpoint is verified: damage raises `DamagedError`, which names the newest
    sound one. A run of several stages goes on in the stage where it stopped. The base of an
    adapter is found where it was or beside the run, or `base` names it; `MismatchError` if that is another model.
    """
    if read.has_stages(source):
        return stage_runs.go_on(place(source), overrides, stop_at_step=stop_at_step, fresh=fresh, exact=exact, quiet=quiet)
    return execution.go_on_with(source, overrides, stop_at_step=stop_at_step, fresh=fresh, run=run, base=base, exact=exact, quiet=quiet)


def recipe_to_resume(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe with which `resume` would go on."""
    if read.has_stages(source):
        return Run(place(source)).recipe.overridden(overrides)
    return recipe_of(read.open(source)).overridden(overrides)


@computes
def fork(
    checkpoint: str | Path | Checkpoint,
    run: str | Path,
    overrides: Iterable[str] = (),
    *,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    fresh: Iterable[Literal["optimizer"]] = (),
    base: str | Path | None = None,
    stop_at_step: int | None = None,
    go_on: bool = False,
    device: Any = None,
    quiet: bool = True,
) -> Run:
    """Begin a new run in `run` from any checkpoint: weights, moments, progress and schedule are kept unless changed on purpose.

    The recipe is the checkpoint's own, or `recipe`, with `overrides`. When its data differ, the new data are read from
    their beginning; when only their weights differ, all are read on. `schedule.start=now` restarts the schedule, `optimizer.lr=now`
    takes the rate of the checkpoint's next update as the full one, `schedule.rewarm=30 steps` adds a rise from here. With `go_on` a
    fork that is there already goes on.
    With an `adapter` in the recipe the checkpoint's weights stay as they are and the new run trains the adapter beside them, with an
    optimizer of its own; where the checkpoint is an adapter, its base is found as in `resume`.
    A checkpoint without training state (a merge, an import) is forked from step 0, with `fresh=["optimizer"]` unless it
    holds moments.
    """
    source, path = read.opened(checkpoint, base=base), place(run)
    before = recipe_of(source) if recipe is None or source.trainer is not None else None
    asked = recipe_to_fork(source, overrides, recipe=recipe)
    name_data(asked.data, before.data if before is not None and recipe is None else None)
    if asked.stages:
        raise InputError("A recipe of several stages is trained from its beginning, not forked into: cairn train RECIPE --run DIR.")
    again = go_on or started_again()
    return execution.branch_off(source, path, asked, before, fresh=fresh, stop_at_step=stop_at_step, again=again, quiet=quiet)
