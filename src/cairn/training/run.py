"""Runs on disk: start one, resume it, fork a new one from a checkpoint.

A run directory holds `recipe.yaml` (as resolved), `metrics.jsonl`, `samples.jsonl` and `checkpoints/step-00000500/`.
A resume continues a run in its own directory, exactly; a fork begins another run from a checkpoint and may change
data, objective, schedule or optimizer on purpose. Lineage records which, and what was changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from cairn.checkpoint.format import read
from cairn.checkpoint.format.compare import keys_that_differ
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.manifest import MANIFEST
from cairn.checkpoint.format.place import is_store, place, remove
from cairn.checkpoint.format.read import CHECKPOINTS, ELSEWHERE, Checkpoint
from cairn.errors import InputError, NotFoundError, ResumeError
from cairn.training import allocator, compiling, loggers
from cairn.training import recipe as recipes
from cairn.training.parallel import started_again
from cairn.training.recipe import Recipe

if TYPE_CHECKING:
    from cairn.checkpoint.saving.capture import Background
    from cairn.training.fault_tolerance import NoProtection

FIXED_ON_RESUME = ("model", "seed", "objective", "reweighting", "data", "optimizer.name", "training.batch", "training.precision", "checkpoint.store")
"""What a resume may not change, since the run would silently become another one; a fork may. `data.mixture` may: it says what is still to come."""


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


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    run: str | Path,
    overrides: Iterable[str] = (),
    *,
    stop_at_step: int | None = None,
    go_on: bool = False,
    quiet: bool = True,
) -> Run:
    """Train from scratch into the new directory `run`.

    `recipe` is a file, the name of a shipped recipe, a mapping or a `Recipe`; `overrides` are `key=value`.
    `stop_at_step` ends this process early, with a checkpoint, without changing what the run would compute. With `go_on`, and
    whenever `torchrun` has started the processes again because one was lost, a run that is there already goes on from its
    newest complete checkpoint. Raises `InputError` for a bad recipe or a directory that is not empty, `ResumeError` if the run
    that is there is another one, `DivergedError` by the recipe's policy.
    """
    asked, path = recipes.load(recipe, overrides), place(run)
    if asked.stages:
        from cairn.training.stages import execute

        return execute(asked, path, stop_at_step=stop_at_step, go_on=go_on, quiet=quiet)
    if go_on or started_again():
        if read.list_checkpoints(path):
            return _continue(path, asked, stop_at_step, quiet)
        _refuse_foreign(path, asked)
    else:
        _refuse_used(path, asked)
    return _Execution(path, asked, quiet).start(stop_at_step)


def resume(
    source: str | Path,
    overrides: Iterable[str] = (),
    *,
    stop_at_step: int | None = None,
    fresh: Iterable[Literal["optimizer"]] = (),
    run: str | Path | None = None,
    quiet: bool = True,
) -> Run:
    """Continue a run from its newest complete checkpoint, in its own directory, exactly where it stopped.

    `source` is a run or its newest checkpoint. Where that is in a store, `run` names the run's directory on this machine, which is
    made if it is not there. Everything is restored or `ResumeError` says what is missing; a fresh
    optimizer must be asked for by name. `overrides` may change how the run goes on (length, precision of reports, number
    of processes), not what it is; lineage lists them. A run of several stages goes on in the stage where it stopped.
    """
    if read.has_stages(source):
        from cairn.training.stages import go_on

        return go_on(place(source), overrides, stop_at_step=stop_at_step, fresh=fresh, quiet=quiet)
    checkpoint = read.open(source)
    path, asked = _run_of(checkpoint, run if run is not None else source), _recipe_of(checkpoint)
    newest = read.list_checkpoints(checkpoint.path.resolve().parent.parent)[-1]
    if checkpoint.path.resolve() != newest.resolve():
        raise ResumeError(f"{checkpoint.path} is not the newest checkpoint of its run ({newest.name} is); use `cairn fork` to branch off from it.")
    wanted = asked.overridden(overrides)
    changed = _allowed_changes(asked, wanted)
    return _Execution(path, wanted, quiet).resume(checkpoint, stop_at_step, changed, fresh_optimizer="optimizer" in set(fresh))


def _allowed_changes(before: Recipe, wanted: Recipe) -> dict[str, tuple[Any, Any]]:
    """What a resume changes: `{key: (before, wanted)}`. Raises `ResumeError` for what it may not."""
    changed = keys_that_differ(before.plain(), wanted.plain())
    frozen = [key for key in changed if key.startswith(FIXED_ON_RESUME) and key != "data.mixture"]
    if frozen:
        raise ResumeError(f"A resume can not change {frozen[0]}: the run would become another one. `cairn fork` begins a new run with it changed.")
    return changed


def _continue(path: Path, asked: Recipe, stop_at_step: int | None, quiet: bool) -> Run:
    """Go on with the run in `path`, which `asked` describes as it was written, before the data had completed it."""
    from cairn.training.sources import fitted

    checkpoint = read.open(path)
    before = _recipe_of(checkpoint)
    wanted = fitted(asked, checkpoint.tokenizer).pinned()
    if wanted.training.compile == "auto":  # decided when the run began
        wanted = wanted.changed({"training.compile": before.training.compile})
    return _Execution(path, wanted, quiet).resume(checkpoint, stop_at_step, _allowed_changes(before, wanted), fresh_optimizer=False)


def recipe_to_resume(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe with which `resume` would go on."""
    if read.has_stages(source):
        return Run(place(source)).recipe.overridden(overrides)
    return _recipe_of(read.open(source)).overridden(overrides)


def fork(
    checkpoint: str | Path | Checkpoint,
    run: str | Path,
    overrides: Iterable[str] = (),
    *,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    fresh: Iterable[Literal["optimizer"]] = (),
    stop_at_step: int | None = None,
    go_on: bool = False,
    quiet: bool = True,
) -> Run:
    """Begin a new run in `run` from any checkpoint: weights, moments, tokens and schedule are kept unless changed on purpose.

    The recipe is the checkpoint's own, or `recipe`, with `overrides`. When its data differ, the new data are read from
    their beginning; when only their weights differ, all are read on. `schedule.start=now` restarts the schedule, `optimizer.lr=now`
    takes the rate of the checkpoint's next update as the full one, `schedule.rewarm=30 steps` adds a rise from here. With `go_on` a
    fork that is there already goes on.
    A checkpoint without training state (a merge, an import) is forked from step 0, with `fresh=["optimizer"]` unless it
    holds moments.
    """
    source, path = checkpoint if isinstance(checkpoint, Checkpoint) else read.open(checkpoint), place(run)
    again = go_on or started_again()
    if again and read.list_checkpoints(path):
        return resume(path, quiet=quiet, stop_at_step=stop_at_step)
    before = _recipe_of(source) if recipe is None or source.trainer is not None else None
    asked = recipe_to_fork(source, overrides, recipe=recipe)
    if asked.stages:
        raise InputError("A recipe of several stages is trained from its beginning, not forked into: cairn train RECIPE --run DIR.")
    (_refuse_foreign if again else _refuse_used)(path, asked)
    changed = keys_that_differ(before.plain(), asked.plain()) if before else {}
    return _Execution(path, asked, quiet).fork(source, stop_at_step, changed, fresh_optimizer="optimizer" in set(fresh))


def recipe_to_fork(
    checkpoint: str | Path | Checkpoint, overrides: Iterable[str] = (), *, recipe: Recipe | Mapping[str, Any] | str | Path | None = None
) -> Recipe:
    """The recipe with which `fork` would begin."""
    source = checkpoint if isinstance(checkpoint, Checkpoint) else read.open(checkpoint)
    tokens = source.tokens or 0
    # A fork does not inherit the place of its parent's checkpoints, nor the part that it played in a larger recipe.
    base = _recipe_of(source).changed({"checkpoint.store": None, "stage": None}) if recipe is None else recipes.load(recipe)
    if "optimizer.lr=now" in (overrides := list(overrides)):
        overrides[overrides.index("optimizer.lr=now")] = f"optimizer.lr={_recipe_of(source).learning_rate(tokens)!r}"
    asked = base.overridden(item.replace("=now", f"={tokens} tokens") for item in overrides)
    if asked.schedule.rewarm.value and not asked.schedule.rewarm_at.value:
        asked = asked.changed({"schedule.rewarm_at": f"{tokens} tokens"})
    return asked


class _Execution:
    """One process's part in a run: builds the trainer, trains, writes checkpoints and figures."""

    def __init__(self, path: Path, recipe: Recipe, quiet: bool) -> None:
        self.path, self.recipe, self.quiet = path, recipe, quiet
        self.kind, self.changed = "run", dict[str, tuple[Any, Any]]()
        self.parent: Checkpoint | None = None
        self.reads_on = False
        self.home = place(recipe.checkpoint.store or path) / CHECKPOINTS

    def start(self, stop_at_step: int | None) -> Run:
        return self._execute("train", stop_at_step, lambda trainer: None)

    def resume(self, source: Checkpoint, stop_at_step: int | None, changed: dict[str, tuple[Any, Any]], *, fresh_optimizer: bool) -> Run:
        from cairn.training import state

        self.parent, self.changed = source, changed | ({"optimizer state": ("kept", "fresh")} if fresh_optimizer else {})
        self.reads_on = True
        return self._execute("resume", stop_at_step, lambda trainer: state.restore(trainer, source, fresh_optimizer=fresh_optimizer))

    def fork(self, source: Checkpoint, stop_at_step: int | None, changed: dict[str, tuple[Any, Any]], *, fresh_optimizer: bool) -> Run:
        from cairn.training import state

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
        from cairn.training.fault_tolerance import protection
        from cairn.training.loop import Trainer
        from cairn.training.parallel import joined
        from cairn.training.sources import fitted, open_data

        with joined(self.recipe) as world:
            if world.device.type == "cpu":
                allocator.keep()
            tokenizer = self.parent.tokenizer if self.parent is not None else None
            with world.first_before_others():
                tokenizer, feed = open_data(self.recipe.pinned().data, self.recipe.seed, tokenizer, special_tokens=self.recipe.objective.special_tokens())
            recipe = fitted(self.recipe, tokenizer).pinned()
            trainer = Trainer(recipe, tokenizer, feed, world, loggers.Logger())
            memory = protection(self.path, recipe, world)
            if name != "resume" or "optimizer state" in self.changed or not memory.restore(trainer, (self.parent and self.parent.step) or 0):
                begin(trainer)
            self._mix(trainer)
            if recipe.training.compile == "auto":
                trainer.decide_compiling(compiling.pays(trainer))
            if world.first:
                self._prepare_directory(trainer)
                trainer.logger = self._logger(trainer)
            world.barrier()
            try:
                with memory:
                    self._train(name, trainer, memory, stop_at_step)
            finally:
                trainer.logger.close()
        return Run(self.path)

    def _mix(self, trainer: Any) -> None:
        """Give the sources the weights that the recipe wants from here on. Where it wants what it wanted before, those that hold stay:
        a callback may have changed them."""
        feed, progress = trainer.feed, trainer.progress
        wanted = trainer.recipe.weights_at(progress.tokens)
        before = _recipe_of(self.parent).weights_at(progress.tokens) if self.parent and self.reads_on else feed.mixture.weights_at(progress.position)
        if wanted != before:
            trainer.change_mixture(wanted)

    def _train(self, name: str, trainer: Any, memory: NoProtection, stop_at_step: int | None) -> None:
        from cairn.checkpoint.saving.capture import Background

        recipe, world = trainer.recipe, trainer.world
        every = max(1, recipe.checkpoint.every.steps(recipe.training.batch, recipe.total_tokens))
        also = {moment.steps(recipe.training.batch, recipe.total_tokens) for moment in recipe.checkpoint.also}
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
        from cairn.checkpoint.saving.write import sweep

        self.path.mkdir(parents=True, exist_ok=True)
        if self.recipe.checkpoint.store is not None:
            (self.path / ELSEWHERE).write_text(f"{self.home}\n")
        if not is_store(self.home):
            self.home.mkdir(parents=True, exist_ok=True)
        sweep(self.home)
        for file in (loggers.METRICS, loggers.SAMPLES):
            loggers.drop_rows_after(self.path / file, trainer.progress.step)
        (self.path / "recipe.yaml").write_text(yaml.safe_dump(trainer.recipe.plain(), sort_keys=False), encoding="utf-8")

    def _logger(self, trainer: Any) -> loggers.Logger:
        files: loggers.Logger = loggers.FileLogger(self.path)
        if self.recipe.track:
            from cairn.training.trackers import trackers

            files = loggers.Loggers(files, *trackers(self.recipe.track, self.path, trainer.recipe.plain(), trainer.progress.step))
        return files if self.quiet else loggers.Loggers(files, loggers.ProgressLogger(trainer.recipe.total_tokens, trainer.progress.tokens))

    def _save(self, name: str, trainer: Any, saver: Background, memory: NoProtection, *, disk: bool, snapshot: bool) -> None:
        """Ask for the state as it stands to be written to disk, kept in memory, or both, of which every process does its share."""
        from cairn.training import state

        if not disk and not snapshot:
            return
        if trainer.world.any(saver.failed):
            saver.finish()  # raises in every process what went wrong in one
        recipe, changed = trainer.recipe, [f"{key}: {old} -> {new}" for key, (old, new) in self.changed.items()]
        if disk:
            self.changed = {}

        def lineage(parent: Checkpoint | None) -> Lineage:
            parents = [parent] if parent is not None else []
            return Lineage.record("run", name, parents=parents, options={"recipe": recipe.plain()}, changed=changed, directory=self.home)

        def published(checkpoint: Checkpoint) -> None:
            if trainer.world.first:
                self._let_go(recipe.checkpoint.keep)

        described = state.describe(trainer)
        keep = memory.keeping(trainer.progress.step, described, lineage(saver.newest)) if snapshot else None
        done = saver.save(self._place(trainer) if disk else None, described, lineage, published, keep)
        if snapshot:
            memory.saved(done)

    def _place(self, trainer: Any) -> Path:
        """Where the checkpoint of this step goes."""
        return self.home / f"step-{trainer.progress.step:08d}"

    def _let_go(self, keep: int | None) -> None:
        for path in read.list_checkpoints(self.path)[:-keep] if keep else []:
            remove(path, MANIFEST)


def _other_data(key: str) -> bool:
    """Whether a change of that key makes other sequences of the data, not just another mixture of the same ones."""
    only_mixed = key == "data.mixture" or (key.startswith("data.sources.") and key.endswith(".weight"))
    return key == "seed" or (key.startswith("data.") and not only_mixed)


def _refuse_used(path: Path, recipe: Recipe) -> None:
    if is_store(path):
        raise InputError(f"{path} is in a store, and a run's own files grow line by line: name a plain directory and set checkpoint.store={path}.")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} is not empty; a new run needs a new directory (`cairn resume {path}` continues the run in it).")
    if recipe.checkpoint.store is not None and read.list_checkpoints(recipe.checkpoint.store):
        raise InputError(f"{recipe.checkpoint.store} holds the checkpoints of another run; a new run needs a place of its own (checkpoint.store=URL).")


def _refuse_foreign(path: Path, recipe: Recipe) -> None:
    """Of a run that was lost before its first checkpoint there is nothing to keep; whatever else lies in `path` is not touched."""
    if not (path / "recipe.yaml").exists():
        _refuse_used(path, recipe)


def _run_of(checkpoint: Checkpoint, named: str | Path) -> Path:
    path = checkpoint.path.resolve().parent.parent
    if checkpoint.path.resolve().parent.name != CHECKPOINTS:
        raise ResumeError(f"{checkpoint.path} does not lie in a run directory; use `cairn fork` to begin a new run from it.")
    if not is_store(path):
        return path
    if is_store(place(named)):
        raise ResumeError(f"{checkpoint.path} is in a store; name the directory of its run on this machine: cairn resume {path} --run DIR.")
    return place(named)


def _recipe_of(checkpoint: Checkpoint) -> Recipe:
    options = checkpoint.lineage.options if checkpoint.lineage is not None else {}
    if "recipe" not in options:
        raise ResumeError(f"{checkpoint.path} does not say with which recipe it was trained; `cairn fork` takes one: cairn fork CKPT RECIPE --run DIR.")
    return recipes.load(options["recipe"])
