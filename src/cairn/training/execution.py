"""One run from its start to its end: data and model are opened, state is restored, the loop runs, checkpoints and figures are written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from cairn.checkpoint.format import documents, read, trust
from cairn.checkpoint.format.carried import luggage
from cairn.checkpoint.format.compare import keys_that_differ
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.manifest import LINEAGE, MANIFEST
from cairn.checkpoint.format.place import is_store, named_place, permit, place, refusals, remove
from cairn.checkpoint.format.read import CHECKPOINTS, ELSEWHERE, Checkpoint
from cairn.checkpoint.saving.capture import Background
from cairn.checkpoint.saving.write import sweep
from cairn.errors import DivergedError, InputError, InterruptedRun, ResumeError
from cairn.training import allocator, compiling, environment, loggers, state
from cairn.training.directory import (
    RECIPE,
    Run,
    begin_again,
    owned,
    recipe_of,
    refuse_damage,
    refuse_foreign,
    refuse_used,
    run_of,
    set_unfinished_aside,
    to_resume,
)
from cairn.training.forking import differences
from cairn.training.loop import Trainer
from cairn.training.parallel import explained, joined, started_again, started_processes
from cairn.training.protection import NoProtection, protection
from cairn.training.recipe import Recipe
from cairn.training.sources import corpora_of, fitted, go_on_reading, open_recorded
from cairn.training.teachers import open_teachers
from cairn.training.trackers import trackers
from cairn.training.trained import base_for, begins_anew

FIXED_ON_RESUME = (
    *("model", "seed", "objective", "reweighting", "data", "adapter", "trainable", "teacher", "optimizer.name"),
    *("training.batch", "training.precision", "checkpoint.store"),
)
"""What a resume may not change, since the run would silently become another one; a fork may. `data.mixture` may: it says what is still to come."""


LENGTH_AND_REPORTS = ("training.tokens", "training.samples", "training.log_every", "checkpoint.", "track", "fault_tolerance.")
"""What an exact resume may change: how long it goes on and what is told and kept of it, none of which changes a bit."""


def begin(recipe: Recipe, path: Path, *, stop_at_step: int | None = None, go_on: bool = False, quiet: bool = True) -> Run:
    """Train a recipe of one stage from scratch into `path`; with `go_on`, and after a restart, go on with what is there."""
    if recipe.checkpoint.store is not None:
        permit(recipe.checkpoint.store, keep=True)
    with owned(path):
        if go_on or started_again():
            if read.list_checkpoints(path):
                return _continue(path, recipe, stop_at_step, quiet)
            refuse_foreign(path, recipe)
        else:
            refuse_used(path, recipe)
        return Execution(path, recipe, quiet).start(stop_at_step)


def go_on_with(
    source: str | Path,
    overrides: Iterable[str] = (),
    *,
    stop_at_step: int | None = None,
    fresh: Iterable[Literal["optimizer"]] = (),
    run: str | Path | None = None,
    base: str | Path | None = None,
    exact: bool = False,
    quiet: bool = True,
) -> Run:
    """Continue a run of one stage from its newest complete checkpoint."""
    path, home, named = run_of(source, run)
    with owned(path):
        checkpoint = to_resume(home, named, base)
        asked = recipe_of(checkpoint)
        if asked.checkpoint.store is not None:
            named_place(asked.checkpoint.store, checkpoint.path / LINEAGE)
        go_on_reading(asked.data)
        wanted = asked.overridden(overrides)
        changed = _allowed_changes(asked, wanted)
        if exact:
            _refuse_other_bits(checkpoint, changed)
        return Execution(path, wanted, quiet).resume(checkpoint, stop_at_step, changed, fresh_optimizer="optimizer" in set(fresh))


def _refuse_other_bits(checkpoint: Checkpoint, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises `ResumeError` for what may change the bits of a run that is to go on exactly."""
    other = {key: values for key, values in changed.items() if not key.startswith(LENGTH_AND_REPORTS)}
    other |= environment.differences(checkpoint.lineage) if checkpoint.lineage is not None else {}
    if other:
        raise ResumeError(f"{checkpoint.path} cannot go on exactly here ({environment.told(other)}); leave --exact out to go on all the same.")


def _allowed_changes(before: Recipe, wanted: Recipe) -> dict[str, tuple[Any, Any]]:
    """What a resume changes: `{key: (before, wanted)}`. Raises `ResumeError` for what it may not."""
    changed = keys_that_differ(before.plain(), wanted.plain())
    frozen = [key for key in changed if key.startswith(FIXED_ON_RESUME) and key != "data.mixture"]
    if frozen:
        raise ResumeError(f"A resume cannot change {frozen[0]}: the run would become another one. `cairn fork` begins a new run with it changed.")
    return changed


def _continue(path: Path, asked: Recipe, stop_at_step: int | None, quiet: bool) -> Run:
    """Go on with the run in `path`, which `asked` describes as it was written, before the data had completed it."""
    checkpoint = to_resume(path)
    before = recipe_of(checkpoint)
    wanted = fitted(asked, asked.data.preprocessor_of(checkpoint)).pinned()
    if wanted.training.compile == "auto":  # decided when the run began
        wanted = wanted.changed({"training.compile": before.training.compile})
    return Execution(path, wanted, quiet).resume(checkpoint, stop_at_step, _allowed_changes(before, wanted), fresh_optimizer=False)


def branch_off(
    source: Checkpoint,
    path: Path,
    asked: Recipe,
    before: Recipe | None,
    *,
    fresh: Iterable[str] = (),
    stop_at_step: int | None = None,
    again: bool = False,
    quiet: bool = True,
) -> Run:
    """Begin a run of the recipe `asked` in `path` from a checkpoint whose own recipe is `before`; with `again`, go on with it if it is there."""
    if asked.checkpoint.store is not None:
        permit(asked.checkpoint.store, keep=True)
    with owned(path):
        if again and read.list_checkpoints(path):
            return go_on_with(path, quiet=quiet, stop_at_step=stop_at_step)
        (refuse_foreign if again else refuse_used)(path, asked)
        if started_processes() > 1 and source.is_ours:
            refuse_damage(source)  # of several processes each reads parts, which are not held against the manifest as they are read
        changed = keys_that_differ(before.plain(), asked.plain()) if before else differences(asked, source)
        return Execution(path, asked, quiet).fork(source, stop_at_step, changed, fresh_optimizer="optimizer" in set(fresh))


class Execution:
    """One process's part in a run: builds the trainer, trains, writes checkpoints and figures."""

    def __init__(self, path: Path, recipe: Recipe, quiet: bool) -> None:
        self.path, self.recipe, self.quiet = path, recipe, quiet
        self.kind, self.changed = "run", dict[str, tuple[Any, Any]]()
        self.parent: Checkpoint | None = None
        self.reads_on = False
        self._told = False
        self.notes: list[str] = []
        """What is said once somebody listens."""
        self.home = place(recipe.checkpoint.store or path) / CHECKPOINTS

    def start(self, stop_at_step: int | None) -> Run:
        return self._execute("train", stop_at_step, lambda trainer: None)

    def resume(self, source: Checkpoint, stop_at_step: int | None, changed: dict[str, tuple[Any, Any]], *, fresh_optimizer: bool) -> Run:
        other = environment.differences(source.lineage) if source.lineage is not None else {}
        self.parent, self.changed = source, changed | other | ({"optimizer state": ("kept", "fresh")} if fresh_optimizer else {})
        if other:
            self.notes.append(f"what may change bits is not as it was at step {source.step}: {environment.told(other)}")
        self.reads_on = True
        return self._execute("resume", stop_at_step, lambda trainer: state.restore(trainer, source, fresh_optimizer=fresh_optimizer))

    def fork(self, source: Checkpoint, stop_at_step: int | None, changed: dict[str, tuple[Any, Any]], *, fresh_optimizer: bool) -> Run:
        fresh_optimizer = fresh_optimizer or begins_anew(self.recipe, source)
        self.parent, self.changed = source, changed | ({"optimizer state": ("kept", "fresh")} if fresh_optimizer else {})
        new_data = any(_other_data(key) for key in changed)
        self.reads_on = source.trainer is not None and not new_data

        def begin(trainer: Any) -> None:
            if source.trainer is None and (fresh_optimizer or source.optimizer is not None):
                state.load_weights(trainer, source)
                if not fresh_optimizer:
                    state.restore_optimizer(trainer, source)
            else:
                state.restore(trainer, source, fresh_optimizer=fresh_optimizer, new_data=new_data)

        return self._execute("fork", stop_at_step, begin)

    def _execute(self, name: str, stop_at_step: int | None, begin: Any) -> Run:
        base = base_for(self.recipe, self.parent)
        with joined(self.recipe) as world:
            if world.device.type == "cpu":
                allocator.keep()
            for corpus in world.peers.gather([corpus for corpus in corpora_of(self.recipe.data).values() if trust.known("data", corpus)])[0]:
                trust.allow("data", corpus)  # what the first process knows
            own = self.recipe.data.preprocessor_of(self.parent) if self.parent is not None else None
            with world.first_before_others():
                preprocessor, feed = open_recorded(self.recipe.pinned().data, self.recipe.seed, own, objective=self.recipe.objective)
            recipe = fitted(self.recipe, preprocessor).pinned()
            teachers = open_teachers(recipe, self.parent, preprocessor, resumed=name == "resume")
            trainer = Trainer(recipe, preprocessor, feed, world, loggers.Logger(), teachers)
            trainer.trained.base = base
            trainer.carried = self._carried(own, preprocessor)
            memory = protection(self.path, recipe, world)
            if name != "resume" or "optimizer state" in self.changed or not memory.restore(trainer, (self.parent and self.parent.step) or 0):
                begin(trainer)
            self._refuse_later_start(trainer)
            trainer.teachers.begin()
            self._mix(trainer)
            if recipe.training.compile == "auto":
                trainer.decide_compiling(compiling.pays(trainer))
            trainer.check()  # what is refused leaves no directory behind
            if world.first:
                self._prepare_directory(trainer)
                trainer.logger = self._logger(trainer)
            world.barrier()
            try:
                for note in self.notes:
                    trainer.logger.message(note)
                share = recipe.training.batch // recipe.parallel.replicas
                with owned(self.path), memory, explained(world, recipe.training.micro_batch, share):
                    self._train(name, trainer, memory, stop_at_step)
            except KeyboardInterrupt:
                raise InterruptedRun(self._interrupted()) from None
            except DivergedError as error:
                raise DivergedError(f"{error} {self._after_divergence(trainer)}") from None
            finally:
                trainer.logger.close()
        return Run(self.path)

    def _carried(self, own: Any, preprocessor: Any) -> dict[str, bytes]:
        """What travels with the weights that this run goes on with: chat template, generation settings, further files of the tokenizer."""
        if self.parent is None:
            return {}
        found = luggage(self.parent)
        if own is None or own.digest != preprocessor.digest:
            found.pop("added_tokens.json", None)  # an objective has added tokens, which are in tokenizer.json alone
        return found

    def _refuse_later_start(self, trainer: Any) -> None:
        start, now = trainer.recipe.schedule.start.units(trainer.recipe.training.batch), trainer.progress.units
        if start > now:
            raise InputError(f"schedule.start is {start} {trainer.recipe.unit}, and the run stands at {now}: a schedule starts where a run stands or before.")

    def _newest(self) -> Path | None:
        paths = read.list_checkpoints(self.home.parent)
        return paths[-1] if paths else None

    def _interrupted(self) -> str:
        newest = self._newest()
        if newest is None:
            return f"interrupted before the first checkpoint; begin again with: {begin_again(self.path)}"
        return f"interrupted; the state of step {int(newest.name.removeprefix('step-'))} is saved in {newest}; go on with: cairn resume {self.path}"

    def _after_divergence(self, trainer: Any) -> str:
        newest, lower = self._newest(), f"optimizer.lr={trainer.recipe.optimizer.lr / 2:g}"
        if newest is None:
            return f"Begin again at a lower rate: {begin_again(self.path)} {lower}."
        return (
            f"Branch off from a checkpoint at a lower rate: cairn fork {newest} {lower} --run {self.path}-lower; "
            f"or go on and leave such updates out: cairn resume {self.path} training.non_finite=skip."
        )

    def _mix(self, trainer: Any) -> None:
        """Give the sources the weights that the recipe wants from here on. Where it wants what it wanted before, those that hold stay:
        a callback may have changed them."""
        feed, progress = trainer.feed, trainer.progress
        wanted = trainer.recipe.weights_at(progress.units)
        before = recipe_of(self.parent).weights_at(progress.units) if self.parent and self.reads_on else feed.mixture.weights_at(progress.position)
        if wanted != before:
            trainer.change_mixture(wanted)

    def _train(self, name: str, trainer: Any, memory: NoProtection, stop_at_step: int | None) -> None:
        recipe, world = trainer.recipe, trainer.world
        every = max(1, recipe.checkpoint.every.steps(recipe.training.batch, recipe.total_units))
        also = {moment.steps(recipe.training.batch, recipe.total_units) for moment in recipe.checkpoint.also}
        spare = 2.0 if every == 1 else 1.1
        with Background(world.more_peers(), world.peers, mode=recipe.checkpoint.capture, buffer=recipe.checkpoint.buffer, spare=spare) as saver:
            saver.newest, trainer.before_update = self.parent, saver.before_update
            memory.begin(trainer)
            # Snapshots in memory need a state on disk to fall back on from the first step; and what they give back may be the last one.
            there = world.peers.gather(self._place(trainer).exists())[0]
            first = not there and (trainer.finished or (trainer.progress.step == 0 and (recipe.checkpoint.first or memory.on)))
            self._save(name, trainer, saver, memory, disk=first, snapshot=memory.on)
            if first:
                saver.finish()
            for moment in trainer.run(stop_at_step):
                disk = moment.last or moment.interrupted or moment.step in (*also, stop_at_step) or moment.step % every == 0
                self._save(name, trainer, saver, memory, disk=disk, snapshot=memory.due(moment))

    def _prepare_directory(self, trainer: Any) -> None:
        """Make the directory of a run, or take away what a process that was lost has left in it."""
        step = trainer.progress.step
        self.path.mkdir(parents=True, exist_ok=True)
        if self.recipe.checkpoint.store is not None:
            documents.keep(self.path / ELSEWHERE, f"{self.home}\n")
        if not is_store(self.home):
            self.home.mkdir(parents=True, exist_ok=True)
            set_unfinished_aside(self.home)
        sweep(self.home)
        loggers.drop_rows_after(self.path / loggers.METRICS, step)
        # Samples of a step whose callbacks were lost on the way are made again.
        loggers.drop_rows_after(self.path / loggers.SAMPLES, step - loggers.awaits_callbacks(self.path, step))
        documents.keep(self.path / RECIPE, yaml.safe_dump(trainer.recipe.plain(), sort_keys=False))

    def _logger(self, trainer: Any) -> loggers.Logger:
        files: loggers.Logger = loggers.FileLogger(self.path)
        if self.recipe.track:
            files = loggers.Loggers(files, *trackers(self.recipe.track, self.path, trainer.recipe.plain(), trainer.progress.step))
        return files if self.quiet else loggers.Loggers(files, loggers.ProgressLogger(trainer.recipe.total_units, trainer.progress.units, trainer.recipe.unit))

    def _save(self, name: str, trainer: Any, saver: Background, memory: NoProtection, *, disk: bool, snapshot: bool) -> None:
        """Ask for the state as it stands to be written to disk, kept in memory, or both, of which every process does its share."""
        if not disk and not snapshot:
            return
        trainer.settle()
        if trainer.world.any(saver.failed):
            saver.finish()  # raises in every process what went wrong in one
        recipe, changed = trainer.recipe, [f"{key}: {old} -> {new}" for key, (old, new) in self.changed.items()]
        if disk:
            self.changed = {}

        def lineage(parent: Checkpoint | None) -> Lineage:
            parents = [parent] if parent is not None else []
            return Lineage.record(
                "run",
                name,
                parents=parents,
                options={"recipe": recipe.plain(), **trainer.trained.lineage(self.home), **trainer.teachers.lineage(self.home)},
                changed=changed,
                directory=self.home,
            )

        def published(checkpoint: Checkpoint) -> None:
            if trainer.world.first:
                self._let_go(recipe.checkpoint.keep, trainer.logger)

        described = state.describe(trainer)
        keep = memory.keeping(trainer.progress.step, described, lineage(saver.newest)) if snapshot else None
        done = saver.save(self._place(trainer) if disk else None, described, lineage, published, keep)
        if snapshot:
            memory.saved(done)

    def _place(self, trainer: Any) -> Path:
        """Where the checkpoint of this step goes."""
        return self.home / f"step-{trainer.progress.step:08d}"

    def _let_go(self, keep: int | None, logger: loggers.Logger) -> None:
        """Remove checkpoints beyond those that are kept. That one cannot be removed never ends a run; it is said once."""
        try:
            for path in read.list_checkpoints(self.path)[:-keep] if keep else []:
                remove(path, MANIFEST)
        except refusals() as error:
            if not self._told:
                logger.message(f"old checkpoints stay: {' '.join(str(error).split())}")
            self._told = True


def _other_data(key: str) -> bool:
    """Whether a change of that key makes other sequences of the data, not just another mixture of the same ones."""
    only_mixed = key == "data.mixture" or (key.startswith("data.sources.") and key.endswith(".weight"))
    return key == "seed" or (key.startswith("data.") and not only_mixed)
