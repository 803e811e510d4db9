"""What every study promises: it states what it does before it does it, and its check can fail.

With the option `record`, the path of a record that `cairn study` has written, nothing is run: the record is held to what the check makes of its runs.
Without it the study runs, all seeds and the control.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cairn import catalog
from cairn.studies.record import StudyRecord
from cairn.testing.suites import Check, demand, suite

FEWEST_SEEDS = 3


@suite("study")
def _studies(kind: str, name: str, options: Mapping[str, Any]) -> Iterator[Check]:
    tried = _Tried(name, str(options["record"]) if "record" in options else None)
    promises = [
        ("it names its paper, its protocol, the published figure, its minutes, its seeds and what the control takes away", tried.states),
        ("its figures are those of its seeds, and conditions and verdict are what the check makes of them", tried.judged),
        ("what is the paper's claim is marked, and the control fails some of what the honest runs show", tried.can_fail),
        ("one seed alone shows nothing that is an estimate", tried.needs_seeds),
    ]
    yield from (Check(f"{kind} {name}", promise, run) for promise, run in promises)


@functools.cache
def _executed(name: str) -> StudyRecord:
    from cairn.studies.runner import execute

    with tempfile.TemporaryDirectory(prefix="cairn-study-") as folder:
        return execute(catalog.get("study", name), Path(folder), lambda text: None)


@dataclass(frozen=True)
class _Tried:
    """A study on trial, by a record of it or by running it."""

    name: str
    path: str | None

    @property
    def item(self) -> Any:
        return catalog.get("study", self.name).implementation()

    @property
    def record(self) -> StudyRecord:
        return StudyRecord.load(Path(self.path)) if self.path is not None else _executed(self.name)

    def states(self, folder: Path) -> None:
        entry, item = catalog.get("study", self.name), self.item
        demand(entry.papers, f"{self.name} names no paper.")
        for key, least in (("protocol", 100), ("published", 20), ("control", 20)):
            demand(len(getattr(item, key, "")) > least, f"{self.name}: its {key} is not told in {least} letters or more.")
        demand(item.minutes > 0, f"{self.name} does not say how many minutes it takes.")
        demand(len(set(item.seeds)) >= FEWEST_SEEDS, f"{self.name} has {len(set(item.seeds))} seeds; an interval needs at least {FEWEST_SEEDS}.")

    def judged(self, folder: Path) -> None:
        record, item = self.record, self.item
        seeds = [[run["seed"] for run in runs] for runs in (record.runs, record.control.runs)]
        demand(seeds == [list(item.seeds)] * 2 and record.seeds == list(item.seeds), f"{self.name}: the runs are not those of its seeds, but of {seeds}.")
        demand(item.check(record.runs) == record.conditions, f"{self.name}: its conditions are not what the check makes of its runs.")
        demand(item.check(record.control.runs) == record.control_conditions, f"{self.name}: the control's conditions are not what the check makes of it.")
        demand(item.also(record.runs) == record.also, f"{self.name}: what is reported besides is not what its runs say.")

    def can_fail(self, folder: Path) -> None:
        record = self.record
        names = [condition.name for condition in record.conditions]
        demand(len(names) == len(set(names)), f"{self.name}: two conditions have one name.")
        demand(names == [condition.name for condition in record.control_conditions], f"{self.name}: the control is judged by other conditions.")
        demand(any(condition.main for condition in record.conditions), f"{self.name}: nothing is marked as the paper's claim.")
        demand(record.verdict != "fails", f"{self.name}: something fails that must hold at any scale.")
        demand(record.control_fails, f"{self.name}: the control fails nothing that the honest runs show, so the check proves nothing.")

    def needs_seeds(self, folder: Path) -> None:
        for condition in self.item.check(self.record.runs[:1]):
            estimate = condition.interval is not None and "over items" not in condition.required
            demand(not estimate or condition.outcome != "shown", f"{self.name}: one seed alone shows '{condition.name}'.")
