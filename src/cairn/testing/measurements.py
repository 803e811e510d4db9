"""What every measurement promises: the same figures each time, whatever the batch and the number of processes; kept by the digest of what was measured.

A measurement is tried on the model of a small run of the first field that gives what it reads (`DataField.sample_recipe`). A class says with
`sample_options` what it cannot do without, with `sample_changes` what else that run needs, and with `one_at_a_time` the options under which one
sample passes through the model at a time.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cairn import catalog
from cairn.options import assign, configure
from cairn.testing.ingredients import sample_field, small_recipe
from cairn.testing.suites import Check, choices, demand, options_round_trip, suite

ROUNDING = 1e-5
"""By how much figures may differ that were computed in another order."""
PROCESSES = "two processes find what one finds"


@suite("measurement")
def _measurements(kind: str, name: str, options: Mapping[str, Any]) -> Iterator[Check]:
    tried = _Tried(name, dict(options))
    promises: list[tuple[str, Callable[[Path], None]]] = [
        ("options come back from plain values, and a typo is an error that names the nearest", lambda _: options_round_trip(kind, name, options)),
        ("the same figures each time, each with an error that is no negative number", tried.repeatable),
        ("one sample at a time or many at once: the same figures under the same protocol", tried.batched),
        (PROCESSES, tried.shared),
        ("what was measured once is kept under the digests of model and protocol, and not measured again", tried.kept),
    ]
    yield from (Check(f"{kind} {name}", promise, run) for promise, run in promises)
    for choice in choices(catalog.get(kind, name).implementation):
        yield Check(f"{kind} {name}", f"{choice}: figures under a protocol of their own", functools.partial(tried.chosen, choice))


@functools.cache
def _subject(field: Any, changes: str) -> Any:
    """The newest checkpoint of a small run, trained once in a process."""
    from cairn.training.run import train

    home = Path(tempfile.mkdtemp(prefix="cairn-subject-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return train(assign(small_recipe(field, home), json.loads(changes).items()), home / "run").newest()


def subject_for(measurement: Any) -> Any:
    """A checkpoint that a measurement (its class) can measure, of a small run."""
    return _subject(sample_field(frozenset({measurement.reads})), json.dumps(dict(getattr(measurement, "sample_changes", {}))))


def figures(rows: list[Any]) -> tuple[list[tuple[Any, ...]], list[float]]:
    """What names each figure, and the figures."""
    return [(row.task, row.metric, row.n, row.chance, row.protocol) for row in rows], [row.value for row in rows]


def near(one: list[float], other: list[float]) -> bool:
    """Whether figures differ by rounding alone."""
    return len(one) == len(other) and all(math.isclose(a, b, rel_tol=0, abs_tol=ROUNDING) for a, b in zip(one, other, strict=True))


@contextlib.contextmanager
def passes() -> Iterator[list[tuple[int, int]]]:
    """The rows and the numbers of every forward pass through a model that is measured; several texts that the request engine plans into one row
    count as so many rows."""
    from cairn.evaluation import engine
    from cairn.evaluation.compute import Compute
    from cairn.evaluation.measurements.activation_statistics import Looking

    seen: list[tuple[int, int]] = []
    opened, planned, look = Compute.model, engine.plan, Looking.observe

    def laid_out(*arguments: Any) -> Any:
        made = planned(*arguments)
        seen.extend((len(one.batch.places), 0) for one in made.passes if len(one.batch.places) > 1)
        return made

    def watched(self: Any, checkpoint: Any) -> Any:
        model = opened(self, checkpoint)
        model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(_size(args, kwargs)), with_kwargs=True)
        return model

    def looked(self: Any, weight: Any, inputs: Any) -> Any:
        seen.append((inputs.shape[0], inputs.shape[0] * inputs.shape[1]))
        return look(self, weight, inputs)

    replaced: list[tuple[Any, str, Any]] = [(engine, "plan", laid_out), (Compute, "model", watched), (Looking, "observe", looked)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield seen
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _size(arguments: Any, named: Any) -> tuple[int, int]:
    first = next(value for value in (*arguments, *named.values()) if value is not None)
    return first.shape[0], first.numel()


@dataclass(frozen=True)
class _Tried:
    """A measurement on trial."""

    name: str
    options: dict[str, Any]

    @property
    def implementation(self) -> Any:
        return catalog.get("measurement", self.name).implementation

    def task(self, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return {"name": self.name, **self.options, **(more or {})}

    def rows(self, more: Mapping[str, Any] | None = None, **how: Any) -> list[Any]:
        from cairn.evaluation.measure import evaluate

        return evaluate(subject_for(self.implementation), [self.task(more)], **{"store": False, "device": "cpu", **how})

    def repeatable(self, folder: Path) -> None:
        one, other = self.rows(), self.rows()
        demand([asdict(row) for row in one] == [asdict(row) for row in other], f"{self.name}: measured twice, it gives two figures.")
        demand(one, f"{self.name} gives no figure.")
        for row in one:
            demand(row.n > 0 and math.isfinite(row.value), f"{self.name}: '{row.metric}' is {row.value} over {row.n} items.")
            demand(row.stderr >= 0, f"{self.name}: the error of '{row.metric}' is {row.stderr}.")

    def batched(self, folder: Path) -> None:
        with passes() as seen:
            many = self.rows()
            together = list(seen)
            seen.clear()
            one = self.rows(self.implementation.one_at_a_time, batch_tokens=1)
            apart = list(seen)
        demand(apart, f"{self.name}: no model was asked, so nothing is known of its batches.")
        rows = {count for count, _ in apart}
        demand(rows == {1}, f"{self.name}: asked for one at a time, it passes {max(rows)} at once; say in one_at_a_time which option does it.")
        demand(len(apart) > len(together), f"{self.name}: it never passes more than one sample at a time, so batches are not tried.")
        demand(figures(one)[0] == figures(many)[0], f"{self.name}: one at a time it gives other figures, or the same under another protocol.")
        demand(near(figures(one)[1], figures(many)[1]), f"{self.name}: one at a time it finds {figures(one)[1]}, many at once {figures(many)[1]}.")

    def shared(self, folder: Path) -> None:
        found = in_processes(subject_for(self.implementation).path, [self.task()], folder / "ranks", [self.implementation])
        alone = figures(self.rows())
        for rank, rows in enumerate(found):
            named = [(row["task"], row["metric"]) for row in rows]
            demand(named == [each[:2] for each in alone[0]], f"{self.name}: process {rank} of two gives other figures than one process.")
            demand(near([row["value"] for row in rows], alone[1]), f"{self.name}: process {rank} of two finds {rows}, one process {alone[1]}.")

    def kept(self, folder: Path) -> None:
        from cairn.evaluation import results

        subject = subject_for(self.implementation)
        first = self.rows(store=True)
        kept = json.loads(next(results.folder(subject).glob(f"*{first[0].protocol[:16]}.json")).read_text())
        demand(kept["model_digest"] == subject.model_digest, f"{self.name}: the figures are kept under another model's digest.")
        demand(kept["protocol"]["name"] == self.name, f"{self.name}: the protocol does not name it.")
        with passes() as seen:
            again = self.rows(store=True)
        demand(again == first and not seen, f"{self.name}: what was measured is measured again.")

    def chosen(self, choice: Mapping[str, Any], folder: Path) -> None:
        usual, rows = self.rows(), self.rows(choice)
        demand(rows and all(row.n > 0 and math.isfinite(row.value) for row in rows), f"{self.name} with {choice} gives no figure.")
        same = configure("measurement", self.task(choice)) == configure("measurement", self.task())
        demand((rows[0].protocol == usual[0].protocol) == same, f"{self.name} with {choice}: the protocol does not tell it from the default.")


_WORKER = """
import importlib, json, os, sys
from dataclasses import asdict
import torch.distributed as dist
from cairn import catalog
from cairn.evaluation import measure
rank, folder, checkpoint, tasks, methods = int(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4]), json.loads(sys.argv[5])
for name, module, qualified in methods:
    found = importlib.import_module(module)
    for part in qualified.split("."):
        found = getattr(found, part)
    if not catalog.has("measurement", name):
        catalog.register("measurement", name)(found)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
rows = measure.evaluate(checkpoint, tasks, store=False, device="cpu")
open(f"{folder}/{rank}.json", "w").write(json.dumps([asdict(row) for row in rows]))
os._exit(0)  # as the command line's workers leave: see cairn.cli.main
"""


def in_processes(checkpoint: Path, tasks: list[dict[str, Any]], folder: Path, methods: list[Any] | None = None) -> list[list[dict[str, Any]]]:
    """What each of two processes that measure together finds of a checkpoint. `methods` are classes of measurements that no package registers."""
    folder.mkdir(parents=True)
    named = [[str(catalog._names[each]), each.__module__, each.__qualname__] for each in methods or []]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    arguments = [str(folder), str(checkpoint), json.dumps(tasks), json.dumps(named)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(rank), *arguments],
            env=environment | {"RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = []
    for worker in workers:
        try:
            said.append(worker.communicate(timeout=240)[1])
        except subprocess.TimeoutExpired:
            for each in workers:
                each.kill()
            raise AssertionError("Two processes that measure together do not end.") from None
    for worker, text in zip(workers, said, strict=True):
        demand(worker.returncode == 0, f"A process of two that measure together fails: {text.strip()[-500:]}")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
