"""Runs on disk: start one, resume it, fork a new one from a checkpoint.

A run directory holds `recipe.yaml` (as resolved), `metrics.jsonl`, `samples.jsonl` and `checkpoints/step-00000500/`.
A resume continues a run in its own directory, exactly; a fork begins another run from a checkpoint and may change
data, objective, schedule or optimizer on purpose. Lineage records which, and what was changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from cairn.checkpoint import read
from cairn.checkpoint.compare import keys_that_differ
from cairn.checkpoint.lineage import Lineage
from cairn.checkpoint.read import Checkpoint
from cairn.errors import InputError, NotFoundError, ResumeError
from cairn.train import compiling, sinks
from cairn.train import recipe as recipes
from cairn.train.recipe import Recipe

CHECKPOINTS = "checkpoints"
FIXED_ON_RESUME = ("model", "seed", "objective", "data", "optimizer.name", "training.batch", "training.precision")
"""What a resume may not change, since the run would silently become another one; a fork may."""


@dataclass(frozen=True)
class Run:
    """A run directory."""

    path: Path

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe as the run last used it."""
        return recipes.load(self.path / "recipe.yaml")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return list(sinks.read_rows(self.path / sinks.METRICS))

    def samples(self) -> list[dict[str, Any]]:
        """What the model wrote as it learned."""
        return list(sinks.read_rows(self.path / sinks.SAMPLES))

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
    quiet: bool = True,
) -> Run:
    """Train from scratch into the new directory `run`.

    `recipe` is a file, the name of a shipped recipe, a mapping or a `Recipe`; `overrides` are `key=value`.
    `stop_at_step` ends this process early, with a checkpoint, without changing what the run would compute.
    Raises `InputError` for a bad recipe or a directory that is not empty, `DivergedError` by the recipe's policy.
    """
    asked, path = recipes.load(recipe, overrides), Path(run)
    _refuse_used(path)
    return _Execution(path, asked, quiet).start(stop_at_step)


def resume(
    source: str | Path,
    overrides: Iterable[str] = (),
    *,
    stop_at_step: int | None = None,
    fresh: Iterable[Literal["optimizer"]] = (),
    quiet: bool = True,
) -> Run:
    """Continue a run from its newest complete checkpoint, in its own directory, exactly where it stopped.

    `source` is a run or its newest checkpoint. Everything is restored or `ResumeError` says what is missing; a fresh
    optimizer must be asked for by name. `overrides` may change how the run goes on (length, precision of reports, number
    of processes), not what it is; lineage lists them.
    """
    checkpoint = read.open(source)
    path, asked = _run_of(checkpoint), _recipe_of(checkpoint)
    newest = read.list_checkpoints(path)[-1]
    if checkpoint.path.resolve() != newest.resolve():
        raise ResumeError(f"{checkpoint.path} is not the newest checkpoint of its run ({newest.name} is); use `cairn fork` to branch off from it.")
    wanted = asked.overridden(overrides)
    changed = keys_that_differ(asked.plain(), wanted.plain())
    frozen = [key for key in changed if key.startswith(FIXED_ON_RESUME)]
    if frozen:
        raise ResumeError(f"A resume can not change {frozen[0]}: the run would become another one. `cairn fork` begins a new run with it changed.")
    return _Execution(path, wanted, quiet).resume(checkpoint, stop_at_step, changed, fresh_optimizer="optimizer" in set(fresh))


def recipe_to_resume(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe with which `resume` would go on."""
    return _recipe_of(read.open(source)).overridden(overrides)


def fork(
    checkpoint: str | Path,
    run: str | Path,
    overrides: Iterable[str] = (),
    *,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    fresh: Iterable[Literal["optimizer"]] = (),
    stop_at_step: int | None = None,
    quiet: bool = True,
) -> Run:
    """Begin a new run in `run` from any checkpoint: weights, moments, tokens and schedule are kept unless changed on purpose.

    The recipe is the checkpoint's own, or `recipe`, with `overrides`. When its data differ, the new data are read from
    their beginning. `schedule.start=now` restarts the schedule, `schedule.rewarm=30 steps` adds a rise from here.
    A checkpoint without training state (a merge, an import) is forked with `fresh=["optimizer"]`, from step 0.
    """
    source, path = read.open(checkpoint), Path(run)
    _refuse_used(path)
    before = _recipe_of(source) if recipe is None or source.trainer is not None else None
    asked = recipe_to_fork(source, overrides, recipe=recipe)
    changed = keys_that_differ(before.plain(), asked.plain()) if before else {}
    return _Execution(path, asked, quiet).fork(source, stop_at_step, changed, fresh_optimizer="optimizer" in set(fresh))


def recipe_to_fork(
    checkpoint: str | Path | Checkpoint, overrides: Iterable[str] = (), *, recipe: Recipe | Mapping[str, Any] | str | Path | None = None
) -> Recipe:
    """The recipe with which `fork` would begin."""
    source = checkpoint if isinstance(checkpoint, Checkpoint) else read.open(checkpoint)
    tokens = source.tokens or 0
    base = _recipe_of(source) if recipe is None else recipes.load(recipe)
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

    def start(self, stop_at_step: int | None) -> Run:
        return self._execute("train", stop_at_step, lambda trainer: None)

    def resume(self, source: Checkpoint, stop_at_step: int | None, changed: dict[str, tuple[Any, Any]], *, fresh_optimizer: bool) -> Run:
        from cairn.train import state

        self.parent, self.changed = source, changed | ({"optimizer state": ("kept", "fresh")} if fresh_optimizer else {})
        return self._execute("resume", stop_at_step, lambda trainer: state.restore(trainer, source, fresh_optimizer=fresh_optimizer))

    def fork(self, source: Checkpoint, stop_at_step: int | None, changed: dict[str, tuple[Any, Any]], *, fresh_optimizer: bool) -> Run:
        from cairn.train import state

        self.parent, self.changed = source, changed | ({"optimizer state": ("kept", "fresh")} if fresh_optimizer else {})
        new_data = any(key.startswith("data.") or key == "seed" for key in changed)

        def begin(trainer: Any) -> None:
            if source.trainer is None and fresh_optimizer:
                state.load_weights(trainer, source)
            else:
                state.restore(trainer, source, fresh_optimizer=fresh_optimizer, new_data=new_data)

        return self._execute("fork", stop_at_step, begin)

    def _execute(self, name: str, stop_at_step: int | None, begin: Any) -> Run:
        from cairn.train.fault_tolerance import protection
        from cairn.train.loop import Trainer
        from cairn.train.parallel import joined
        from cairn.train.sources import fitted, open_data

        with joined(self.recipe) as world:
            tokenizer = self.parent.tokenizer if self.parent is not None else None
            with world.first_before_others():
                tokenizer, feed = open_data(self.recipe.data, self.recipe.seed, tokenizer)
            recipe = fitted(self.recipe, tokenizer).pinned()
            trainer = Trainer(recipe, tokenizer, feed, world, sinks.Sink())
            memory = protection(self.path, recipe, world)
            if name != "resume" or "optimizer state" in self.changed or not memory.restore(trainer, (self.parent and self.parent.step) or 0):
                begin(trainer)
            if recipe.training.compile == "auto":
                trainer.decide_compiling(compiling.pays(trainer))
            if world.first:
                self._prepare_directory(trainer)
                trainer.sink = self._sink(trainer)
            world.barrier()
            try:
                with memory:
                    self._train(name, trainer, memory, stop_at_step)
            finally:
                trainer.sink.close()
        return Run(self.path)

    def _train(self, name: str, trainer: Any, memory: Any, stop_at_step: int | None) -> None:
        recipe = trainer.recipe
        every = max(1, recipe.checkpoint.every.steps(recipe.training.batch, recipe.total_tokens))
        also = {moment.steps(recipe.training.batch, recipe.total_tokens) for moment in recipe.checkpoint.also}
        # Snapshots in memory need a state on disk to fall back on from the first step; and what they give back may be the last one.
        there = trainer.world.peers.gather(self._place(trainer).exists())[0]
        if not there and (trainer.finished or (trainer.progress.step == 0 and (recipe.checkpoint.first or memory.on))):
            self._save(name, trainer)
        trainer.before_update = memory.before_update
        memory.begin(trainer, lambda: self._lineage(name, trainer))
        for moment in trainer.run(stop_at_step):
            memory.after(moment, trainer, lambda: self._lineage(name, trainer))
            if moment.last or moment.interrupted or moment.step in (*also, stop_at_step) or moment.step % every == 0:
                self._save(name, trainer)

    def _prepare_directory(self, trainer: Any) -> None:
        from cairn.checkpoint.write import sweep

        (self.path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        sweep(self.path / CHECKPOINTS)
        for file in (sinks.METRICS, sinks.SAMPLES):
            sinks.drop_rows_after(self.path / file, trainer.progress.step)
        (self.path / "recipe.yaml").write_text(yaml.safe_dump(trainer.recipe.plain(), sort_keys=False), encoding="utf-8")

    def _sink(self, trainer: Any) -> sinks.Sink:
        files = sinks.Files(self.path)
        return files if self.quiet else sinks.Several(files, sinks.Terminal(trainer.recipe.total_tokens, trainer.progress.tokens))

    def _save(self, name: str, trainer: Any) -> None:
        """Write the state as it stands, every process its share; then let old checkpoints go."""
        from cairn.train import state

        lineage = self._lineage(name, trainer)
        self.parent, self.changed = state.save(trainer, self._place(trainer), lineage), {}
        if trainer.world.first:
            self._let_go(trainer.recipe.checkpoint.keep)

    def _place(self, trainer: Any) -> Path:
        """Where the checkpoint of this step goes."""
        return self.path / CHECKPOINTS / f"step-{trainer.progress.step:08d}"

    def _lineage(self, name: str, trainer: Any) -> Lineage:
        return Lineage.record(
            "run",
            name,
            parents=[self.parent] if self.parent is not None else [],
            options={"recipe": trainer.recipe.plain()},
            changed=[f"{key}: {old} -> {new}" for key, (old, new) in self.changed.items()],
            directory=self.path / CHECKPOINTS,
        )

    def _let_go(self, keep: int | None) -> None:
        for path in read.list_checkpoints(self.path)[:-keep] if keep else []:
            # Out of sight first: a kill in the middle of the removal must not leave half a checkpoint visible.
            hidden = path.with_name(f".old-{path.name}")
            path.rename(hidden)
            shutil.rmtree(hidden)


def _refuse_used(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} is not empty; a new run needs a new directory (`cairn resume {path}` continues the run in it).")


def _run_of(checkpoint: Checkpoint) -> Path:
    path = checkpoint.path.resolve().parent.parent
    if checkpoint.path.resolve().parent.name != CHECKPOINTS:
        raise ResumeError(f"{checkpoint.path} does not lie in a run directory; use `cairn fork` to begin a new run from it.")
    return path


def _recipe_of(checkpoint: Checkpoint) -> Recipe:
    options = checkpoint.lineage.options if checkpoint.lineage is not None else {}
    if "recipe" not in options:
        raise ResumeError(f"{checkpoint.path} does not say with which recipe it was trained; `cairn fork` takes one: cairn fork CKPT RECIPE --run DIR.")
    return recipes.load(options["recipe"])
