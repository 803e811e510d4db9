"""The directory of a run: `recipe.yaml` (as resolved), `metrics.jsonl`, `samples.jsonl` and `checkpoints/step-00000500/`."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
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

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Run:
    """A run directory."""

    path: Path

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe as the run last used it."""
        return recipes.load(self.path / RECIPE)

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


OWNER = ".owner"
"""A run's directory holds this file while a process trains in it; the lock on it ends with the process, however that ends."""
_held: dict[Path, int] = {}


@contextlib.contextmanager
def owned(path: Path) -> Iterator[None]:
    """Nobody else trains in `path` meanwhile. Raises `InputError` that names who does.

    Of several processes of one run the first holds the lock. A directory that is not there yet is nobody's.
    """
    key = path.absolute()
    if int(os.environ.get("RANK") or 0) or is_store(path) or not path.is_dir() or key in _held:
        yield
        return
    _held[key] = _lock(path)
    try:
        yield
    finally:
        (path / OWNER).unlink(missing_ok=True)
        os.close(_held.pop(key))


def _lock(path: Path) -> int:
    file = path / OWNER
    while True:
        try:
            lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {(error.strerror or str(error)).rstrip('.')}.") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.pread(lock, 200, 0).decode("utf-8", "replace").strip() or "another process"
            os.close(lock)
            raise InputError(f"{path} is being trained by {who}: a run has one trainer at a time. Wait until it ends, or end it.") from None
        except OSError:
            warnings.warn(f"{path} lies on a file system without locks: nothing keeps two trainers apart there.", stacklevel=2)
        # The process that held it before may have removed the file between our opening and our lock.
        if file.exists() and os.fstat(lock).st_ino == file.stat().st_ino:
            break
        os.close(lock)
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()} (since {datetime.now().astimezone():%Y-%m-%d %H:%M:%S})\n".encode(), 0)
    return lock


def contents(path: Path) -> list[Path]:
    """What lies in a directory, but for the lock of its owner."""
    return [inside for inside in path.iterdir() if inside.name != OWNER]


def refuse_used(path: Path, recipe: Recipe) -> None:
    if is_store(path):
        raise InputError(f"{path} is in a store, and a run's own files grow line by line: name a plain directory and set checkpoint.store={path}.")
    if path.exists() and (not path.is_dir() or contents(path)):
        raise InputError(f"{path} is not empty; a new run needs a new directory{_advice(path)}.")
    if recipe.checkpoint.store is not None and read.list_checkpoints(recipe.checkpoint.store):
        raise InputError(f"{recipe.checkpoint.store} holds the checkpoints of another run; a new run needs a place of its own (checkpoint.store=URL).")


def _advice(path: Path) -> str:
    """What else may be meant by a directory that is not empty."""
    if path.is_dir() and (read.has_stages(path) or read.list_checkpoints(path)):
        return f" (`cairn resume {path}` continues the run in it)"
    if (path / RECIPE).is_file():
        return f" (the run in it ended before its first checkpoint: `{begin_again(path)}` begins it again)"
    return ""


def begin_again(path: Path) -> str:
    """The command that begins a run again that has no checkpoint yet."""
    return f"cairn train {path / RECIPE} --run {path} --continue"


def refuse_foreign(path: Path, recipe: Recipe) -> None:
    """A run that was lost before its first checkpoint has nothing to keep; any other contents of `path` are refused, not touched."""
    if not (path / RECIPE).exists():
        refuse_used(path, recipe)


def refuse_damage(checkpoint: Checkpoint) -> None:
    """Raise `DamagedError`, which names the newest sound checkpoint, unless every byte is what was written. Each process reads its share."""
    rank, size = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
    report = check(checkpoint.path, share=(rank, size))
    if not report.sound:
        raise DamagedError(f"{checkpoint.path} is damaged: {report.damage[0]}.{read.way_on(read.older_than(checkpoint.path))}")


def set_damaged_aside(checkpoint: Checkpoint) -> None:
    """Move newer checkpoints that are damaged out of the way of what is written next. Raises `ResumeError` where a newer one is sound."""
    path = checkpoint.path
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


def run_of(source: str | Path, run: str | Path | None) -> tuple[Path, Path, Path | None]:
    """The directory of a run, the place that lists its checkpoints, and the one that was named, if it was one.

    `source` is a run or a checkpoint, where it was named: links are not followed. Where it is in a store, `run` names the directory.
    """
    path, named = place(source), None
    if path.name.startswith("step-") or (path.is_dir() and (path / MANIFEST).exists()):
        named = path if is_store(path) else path.absolute()
        if named.parent.name != CHECKPOINTS:
            raise ResumeError(f"{path} does not lie in a run directory; use `cairn fork` to begin a new run from it.")
    home = path if named is None else named.parent.parent
    if run is None and is_store(home):
        raise ResumeError(f"{path} is in a store; name the directory of its run on this machine: cairn resume {path} --run DIR.")
    return place(run) if run is not None else home, home, named


def to_resume(run: Path, named: Path | None = None, base: str | Path | None = None) -> Checkpoint:
    """The checkpoint with which a run goes on: its newest, every byte of which is verified, or an older one where all that are newer are damaged.

    Raises `DamagedError` that names the newest sound one, `ResumeError` where there is none yet or a newer one is sound.
    """
    if named is None and not read.list_checkpoints(run):
        if (run / RECIPE).is_file() and not (run / MANIFEST).exists():
            raise ResumeError(f"{run} has no complete checkpoint yet, so there is nothing to go on from; `{begin_again(run)}` begins it again.")
        raise NotFoundError(f"{read.open(run).path} is not a checkpoint of a run: `cairn fork` begins one from it.")
    checkpoint = read.open(named or run, base=base)
    refuse_damage(checkpoint)
    set_damaged_aside(checkpoint)
    return checkpoint


def recipe_of(checkpoint: Checkpoint) -> Recipe:
    options = checkpoint.lineage.options if checkpoint.lineage is not None else {}
    if "recipe" not in options:
        raise ResumeError(f"{checkpoint.path} does not say with which recipe it was trained; `cairn fork` takes one: cairn fork CKPT RECIPE --run DIR.")
    return recipes.load(options["recipe"])
