"""Merging methods side by side: the same checkpoints, the same budget of trials, chosen on one set of data and reported on another.

The gate comes first: where tuned task arithmetic does not beat the base, these checkpoints cannot show which method is better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cairn import catalog
from cairn.checkpoint.format import read
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating.stream import Operation
from cairn.device import computes
from cairn.errors import InputError
from cairn.evaluation.measure import Score
from cairn.merging.search import SearchResult, search
from cairn.merging.target import Bench, Measure, MergeTarget
from cairn.statistics import interval

GATE = 0.03
"""By how much tuned task arithmetic must beat the base: in points of a share, or as a share of a loss."""
METHODS = ("average", "task-arithmetic", "ties", "dare", "consensus", "pcb")


@dataclass(frozen=True)
class Line:
    """One line of the table: value on the reported data with its 95 % interval, value on the data that chose, options, trials."""

    what: str
    value: float
    low: float
    high: float
    chosen_value: float | None = None
    trials: int = 0
    options: dict[str, Any] | None = None


@dataclass(frozen=True)
class MethodComparison:
    """The table, the base first, and whether the gate is passed."""

    lines: list[Line]
    lower: bool
    demonstrable: bool
    verdict: str
    objective: dict[str, Any]

    @property
    def best(self) -> Line:
        """The merge that was best on the data that chose."""
        merges = [line for line in self.lines if line.options is not None]
        return min(merges, key=lambda line: (line.chosen_value or 0.0) * (1 if self.lower else -1))

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@computes
def compare(
    experts: Sequence[str | Path | Checkpoint],
    base: str | Path | Checkpoint,
    objective: Callable[[Checkpoint], MergeTarget] | MergeTarget,
    methods: Sequence[str] = METHODS,
    *,
    budget: int = 20,
    seed: int = 0,
    device: Any = None,
    progress: Callable[[str], object] = lambda text: None,
) -> MethodComparison:
    """Give every method the same number of trials and report each once; task arithmetic is always among them, for the gate.

    Raises `InputError` without data to report on, and whatever a method says of checkpoints that do not belong together.
    """
    first, *others = [item if isinstance(item, Checkpoint) else read.open(item) for item in (base, *experts)]
    objective = objective if isinstance(objective, MergeTarget) else objective(first)
    if objective.report is None:
        raise InputError("A comparison chooses on one set of data and reports on another; give report.KEY=VALUE too.")
    if budget < 1:
        raise InputError("A comparison needs a budget of at least one trial for each method.")
    names = list(dict.fromkeys(["task-arithmetic", *methods]))
    parents = {name: [first, *others] if getattr(catalog.get(Operation, name).implementation, "based", False) else others for name in names}
    for name in names:
        catalog.get(Operation, name).implementation().check(parents[name])
    bench = Bench([first, *others])
    lines = [_alone("base", first, bench, objective.report)]
    lines += [_alone(f"expert {expert.path.name}", expert, bench, objective.report) for expert in others]
    for name in names:
        progress(f"tuning {name}")
        found = search(name, bench, objective, budget, seed=seed, parents=parents[name])
        lines.append(_line(name, _reported(name, found, bench, objective.report, parents[name]), found))
    tuned = next(line for line in lines if line.what == "task-arithmetic")
    gain = lines[0].value - tuned.value if objective.lower else tuned.value - lines[0].value
    needed = GATE * abs(lines[0].value) if objective.lower else GATE
    passed = gain >= needed
    verdict = (
        f"tuned task arithmetic beats the base by {gain:.4f} (needed: {needed:.4f})"
        if passed
        else f"not demonstrable here: tuned task arithmetic beats the base by {gain:.4f} where {needed:.4f} is needed, so these figures do not rank methods"
    )
    return MethodComparison(lines, objective.lower, passed, verdict, objective.described)


def _reported(name: str, found: SearchResult, bench: Bench, report: Measure, parents: Sequence[Checkpoint]) -> Score:
    operation = catalog.get(Operation, name).implementation.parse(found.options, f"operation '{name}'")
    return bench.score(operation, report, parents)


def _alone(what: str, checkpoint: Checkpoint, bench: Bench, report: Measure) -> Line:
    return _line(what, bench.alone(checkpoint, report), None)


def _line(what: str, score: Score, found: SearchResult | None) -> Line:
    ends = (score.value, *interval(score.value, score.stderr, score.n))
    return Line(what, *ends) if found is None else Line(what, *ends, found.value, len(found.trials), found.options)
