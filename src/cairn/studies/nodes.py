"""Nodes of a job, played on one machine: a process group each, with a memory of its own that can be taken away.

A node dies here as nodes die: its trainer and its keeper get SIGKILL and its memory is gone. Faults inside a process (while it
writes a snapshot, in the middle of an update) are set off by the process itself, at a chosen step, with SIGKILL too.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cairn.checkpoint.memory import link

FINISHED, PATIENCE = 0, 120.0
PRELOADED = (
    *("cairn.studies.nodes", "cairn.training.run", "cairn.training.loop", "cairn.training.state", "cairn.training.sources", "cairn.checkpoint.memory.persist"),
    *("cairn.models.families.llama", "cairn.training.objectives.causal_lm", "cairn.training.optimizers.adamw", "cairn.training.schedules.cosine"),
    *("cairn.data.corpora.dataset", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch._dynamo"),
)
"""Imported once, by the process from which all trainers are forked: a start then takes tenths of a second."""


@dataclass(frozen=True)
class Fault:
    """Where a trainer kills itself: `writing` its snapshot of a step, in the `update` that would make the step, or before `saving` it to disk."""

    rank: int
    where: str
    step: int


@dataclass
class NodeJob:
    """A run of `nodes` processes, one a node, as `cairn train` and `cairn resume` would start them."""

    run: Path
    nodes: int
    settings: Sequence[str] = ()
    layout: str = "shard"
    """The dimension of the mesh along which the processes lie."""
    prepare: str = ""
    """A function of this package, `module:name`, that each trainer calls first; studies spoil things with it."""
    ended: list[int | None] = field(default_factory=list)
    """How each trainer had ended when `finish` looked: a status, a signal as a negative number, None for one that lived."""
    _processes: list[Any] = field(default_factory=list)

    def start(self, recipe: Mapping[str, Any] | None = None, fault: Fault | None = None, settings: Sequence[str] = ()) -> None:
        """Begin the run with a recipe, or resume it without one; `settings` are for this time alone."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        port = _free_port()
        self._processes = []
        for rank in range(self.nodes):
            place = {"RANK": str(rank), "WORLD_SIZE": str(self.nodes), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            place |= {"CAIRN_NODE": f"node-{rank}", "CAIRN_MEMORY": str(self.memory(rank)), "OMP_NUM_THREADS": "1"}
            place |= {name: os.environ[name] for name in ("CAIRN_CACHE", "CAIRN_DATA", "CAIRN_STATE") if name in os.environ}
            every = [f"parallel.{self.layout}={self.nodes}", *self.settings, *settings]
            order = (place, str(self.run), dict(recipe) if recipe is not None else None, every, asdict(fault) if fault else None, self.prepare)
            process = context.Process(target=_work, args=order)
            process.start()
            self._processes.append(process)

    def memory(self, rank: int) -> Path:
        """The memory of a node."""
        return self.run.with_name(f"{self.run.name}-memory") / f"node-{rank}"

    def finish(self, within: float = PATIENCE) -> bool:
        """Wait until all trainers have ended, or one has died, upon which the others are killed, as a launcher does; whether all ended well."""
        end = time.monotonic() + within
        while time.monotonic() < end and any(process.exitcode is None for process in self._processes):
            if any(process.exitcode not in (None, FINISHED) for process in self._processes):
                time.sleep(0.05)
                break
            time.sleep(0.005)
        self.ended = [process.exitcode for process in self._processes]
        self.stop()
        return all(process.exitcode == FINISHED for process in self._processes)

    def stop(self) -> None:
        """Kill every trainer."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def kill(self, rank: int) -> None:
        """SIGKILL one trainer."""
        self._processes[rank].kill()

    @property
    def alive(self) -> bool:
        return all(process.exitcode is None for process in self._processes)

    def when(self, ready: Callable[[], bool], within: float = PATIENCE) -> bool:
        """Wait until something is so while the trainers live; whether it came to be."""
        end = time.monotonic() + within
        while self.alive and time.monotonic() < end:
            if ready():
                return True
            time.sleep(0.002)
        return False

    def step(self) -> int:
        """The last step that metrics.jsonl tells of."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        whole = [line for line in lines if line.endswith("}")]
        return int(json.loads(whole[-1])["step"]) if whole else 0

    def lose(self, rank: int) -> None:
        """A node is lost: its keeper dies and its memory is gone (its trainer is killed before)."""
        home = link.homes(self.run).get(f"node-{rank}-0")
        if home is not None:
            kill_process(home.pid)
        shutil.rmtree(self.memory(rank), ignore_errors=True)

    def end(self) -> None:
        """Leave nothing behind."""
        self.stop()
        for rank in range(self.nodes):
            self.lose(rank)
        shutil.rmtree(self.memory(0).parent, ignore_errors=True)

    def __enter__(self) -> NodeJob:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def kill_process(pid: int) -> None:
    """SIGKILL, and wait until it is gone."""
    try:
        os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}").exists() and _state(pid) != "Z":
            time.sleep(0.002)
    except ProcessLookupError:
        return  # gone already


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _work(place: dict[str, str], run: str, recipe: dict[str, Any] | None, settings: list[str], fault: dict[str, Any] | None, prepare: str) -> None:
    """What a trainer process does. A gloo error after another's death is expected, and not shown."""
    import importlib

    os.environ.update(place)
    os.dup2(os.open(f"{run}-trainer-{place['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    if prepare:
        module, _, name = prepare.partition(":")
        getattr(importlib.import_module(module), name)()
    if fault is not None and fault["rank"] == int(place["RANK"]):
        {"writing": _die_writing, "update": _die_updating, "saving": _die_saving}[fault["where"]](fault["step"])
    from cairn.training.run import resume, train

    if recipe is not None:
        train(recipe, run, settings)
    else:
        resume(run, settings)
    os._exit(FINISHED)


def _die_writing(step: int) -> None:
    """Die with a snapshot half written."""
    from cairn.checkpoint.memory.snapshots import Snapshots

    begin, place = Snapshots.begin, Snapshots.place
    current = [0, 0]

    def begin_and_note(self: Snapshots, at: int, *arguments: Any) -> bool:
        current[:] = [at, 0]
        return begin(self, at, *arguments)

    def place_or_die(self: Snapshots, *arguments: Any) -> Any:
        if current[0] >= step and current[1] == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        current[1] += 1
        return place(self, *arguments)

    Snapshots.begin, Snapshots.place = begin_and_note, place_or_die  # type: ignore[assignment, method-assign]


def _die_updating(step: int) -> None:
    """Die with some of the weights changed and others not."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    from cairn.training.loop import Trainer

    update, current = Trainer.update, [0]

    def update_and_note(self: Trainer, micro_batches: Any) -> Any:
        current[0] = self.progress.step + 1
        return update(self, micro_batches)

    def die(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if current[0] >= step:
            with torch.no_grad():
                for parameter in optimizer.param_groups[0]["params"][::2]:
                    parameter.mul_(0.5)
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer.update = update_and_note  # type: ignore[method-assign]
    register_optimizer_step_pre_hook(die)


def _die_saving(step: int) -> None:
    """Die while a step that memory holds already is written to disk."""
    from cairn.checkpoint.saving.capture import Background

    publish = Background._publish

    def publish_or_die(self: Background, capture: Any, path: Path) -> Any:
        if int(path.name.removeprefix("step-")) >= step:
            while capture._keeping is not None:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return publish(self, capture, path)

    Background._publish = publish_or_die  # type: ignore[method-assign]
