"""Snapshots in memory while a run trains (`fault_tolerance.memory.every=5 fault_tolerance.memory.parity=1`).

A snapshot has the contents of a checkpoint, and each process copies its share of them. A resumed run takes the newest
state that its keepers can give back, if it is not older than the newest on disk, in whatever layout it now has.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from cairn.checkpoint.format.documents import as_json
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.manifest import LINEAGE
from cairn.checkpoint.format.parts import local_of
from cairn.checkpoint.memory import link as links
from cairn.checkpoint.memory.area import Version
from cairn.checkpoint.memory.link import Settings
from cairn.checkpoint.memory.plan import find
from cairn.checkpoint.memory.restore import Snapshot
from cairn.checkpoint.memory.snapshots import Snapshots, groups
from cairn.errors import CairnError
from cairn.training import state
from cairn.training.loggers import Logger

if TYPE_CHECKING:
    from cairn.checkpoint.saving.captured import Keeping, NamedState, Parts, Specs
    from cairn.training.context import Moment, TrainingContext
    from cairn.training.fault_tolerance import MemoryOptions
    from cairn.training.parallel import World
    from cairn.training.recipe import Recipe


class NoProtection:
    """Fault tolerance as a run sees it, where there is none but its checkpoints."""

    on = False

    def restore(self, trainer: TrainingContext, at_least: int) -> bool:
        """Take the newest state in memory that is whole, if its step is at least that; whether there was one."""
        return False

    def begin(self, trainer: TrainingContext) -> None:
        """Before the first update."""

    def due(self, moment: Moment) -> bool:
        """Whether a snapshot is to be taken at this moment."""
        return False

    def keeping(self, step: int, state: NamedState, lineage: Lineage) -> Callable[[Specs, Parts], Keeping | None] | None:
        """What gives the memory for a snapshot of this state."""
        return None

    def saved(self, done: threading.Event) -> None:
        """A save was asked for; `done` tells when nothing of it is under way any more."""

    def close(self, *, finished: bool) -> None:
        """The run has ended; `finished` with its state on disk."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(finished=kind is None)


class Protection(NoProtection):
    """Snapshots in memory."""

    on = True

    def __init__(self, run: Path, memory: MemoryOptions, world: World) -> None:
        self._run, self._memory, self._world = run, memory, world
        self._snapshots: Snapshots | None = None
        self._restored: Version | None = None
        self._interrupted = False
        self._reading: list[threading.Event] = []
        self._logger = Logger()

    def restore(self, trainer: TrainingContext, at_least: int) -> bool:
        # Where the memory turns out damaged on the way, the trainer is left for a checkpoint on disk to fill, which overwrites all of it.
        plan = self._world.peers.gather(find(self._run, at_least) if self._world.first else None)[0]
        if plan is None:
            return False
        links.allow(self._run)  # the first process knows the run, or it would have refused
        error = None
        try:
            with contextlib.closing(Snapshot(plan)) as snapshot:
                state.restore(trainer, snapshot)
        except CairnError as met:
            error = str(met)
        failed = next((each for each in self._world.peers.gather(error) if each), None)
        if failed is None:
            self._restored = plan.version
        else:
            trainer.optimizer.state.clear()
        return failed is None

    @property
    def restored(self) -> Version | None:
        """The version with which the run went on, if it came from memory."""
        return self._restored

    def begin(self, trainer: TrainingContext) -> None:
        run, peers, node = self._run.resolve(), self._world.peers, links.node()
        identity = peers.gather(links.identity(run) if self._world.first else "")[0]
        nodes = peers.gather(node)
        name = f"{node}-{nodes[: peers.rank].count(node)}"
        folder, warning = links.memory_folder(identity, name, self._needed(trainer))
        group = groups(nodes, self._memory.group, self._memory.parity)[peers.rank]
        if warning:
            self._say(trainer, warning)
        if self._memory.parity and len(group) == 1:
            self._say(
                trainer,
                f"parity {self._memory.parity} needs a group of more nodes than this run has ({len(set(nodes))}): "
                "snapshots survive trainers and keepers, not the loss of a node",
            )
        settings = Settings(
            run=str(run),
            name=name,
            node=node,
            folder=str(folder),
            slots=self._memory.slots,
            idle=self._memory.idle,
            address=_address() if len(set(nodes)) > 1 else None,
        )
        self._snapshots = Snapshots(settings, group, self._memory.parity, peers, say=lambda text: self._say(trainer, text))
        if self._restored is not None:
            self._snapshots.keep = self._restored
            self._say(trainer, f"goes on from the snapshot of step {self._restored.step} in memory")
        self._logger = trainer.logger

    def due(self, moment: Moment) -> bool:
        self._interrupted = moment.interrupted
        return moment.step % self._memory.every == 0

    def keeping(self, step: int, state: NamedState, lineage: Lineage) -> Callable[[Specs, Parts], Keeping | None]:
        return lambda specs, parts: self._begun(step, state, lineage, specs, parts)

    def _begun(self, step: int, state: NamedState, lineage: Lineage, specs: Specs, parts: Parts) -> Keeping | None:
        """The memory of the next snapshot, or None where it is left out."""
        assert self._snapshots is not None
        for done in self._reading[:-1]:
            done.wait()  # the slot that comes next may still be read by a save to disk; that of the last snapshot is not touched
        del self._reading[:-1]
        files = {**state.files, LINEAGE: as_json(lineage.model_dump(mode="json"))} if self._world.first else {}
        return self._snapshots if self._snapshots.begin(step, specs, parts, files) else None

    def saved(self, done: threading.Event) -> None:
        self._reading.append(done)

    def _needed(self, trainer: TrainingContext) -> int:
        """Bytes that the snapshots of this process will need: weights and two moments of each, in every slot, with parity."""
        weights = sum(local_of(parameter).nbytes for parameter in trainer.model.parameters())
        return (self._memory.slots + self._memory.parity) * 3 * weights

    def close(self, *, finished: bool) -> None:
        # After the first Ctrl-C the state is saved before the run ends; a second one ends it at once.
        if self._snapshots is not None:
            counts = self._snapshots.counts
            self._logger.message(
                f"{counts['snapshots']} snapshots in memory, {counts['left out']} left out; training waited {self._snapshots.waited:.1f} s for them"
            )
            self._snapshots.close(finished=finished or self._interrupted)

    def _say(self, trainer: TrainingContext, text: str) -> None:
        trainer.logger.message(text)


def protection(run: Path, recipe: Recipe, world: World) -> NoProtection:
    """What the recipe asks for."""
    memory = recipe.fault_tolerance.memory
    return Protection(run, memory, world) if memory is not None else NoProtection()


def _address() -> str:
    """Where other nodes reach this one: $CAIRN_ADDRESS, else the address from which it reaches the job's master."""
    named = os.environ.get("CAIRN_ADDRESS")
    if named:
        return named
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "1"))))
        return str(probe.getsockname()[0])
