"""What happens to old and new abilities when training goes on: the stability gap, and what continuing costs and gains.

    depth     a(0) - min a(t)                 recovery   first t > t_min with a(t) >= a(0), infinite if there is none
    area      integral of max(0, a(0) - a(t)) over the share of the run that has passed
    gain      a(T) - a(0)

for an ability a that is to be high; losses are turned over. "Efficient Continual Pre-training by Mitigating the Stability Gap";
rise, forgetting, gain and the Pareto set as in "Continual Pre-Training of Large Language Models: How to (re)warm your model?".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cairn.checkpoint.format.descent import find
from cairn.checkpoint.format.read import Checkpoint
from cairn.device import choose, computes
from cairn.errors import InputError, suggestion
from cairn.evaluation.measure import Measurement
from cairn.options import configure
from cairn.statistics import first_largest

if TYPE_CHECKING:
    from cairn.evaluation.measure import Score
    from cairn.training.run import Run

EARLY = 0.2
"""Share of the run in which a rise counts as initial."""


@dataclass(frozen=True)
class Gap:
    """Statistics of one curve from the moment of the change on. Times are in the curve's own units (tokens or steps)."""

    start: float
    end: float
    depth: float
    at: float
    recovery: float
    area: float
    gain: float


def stability_gap(times: ArrayLike, values: ArrayLike, *, higher_is_better: bool = False) -> Gap:
    """The stability gap of a curve whose first point is the value before the change.

    times (n,) ascending, values (n,): a loss unless `higher_is_better`. depth, area and gain are in units of the values and positive where
    it got worse, worse and better; the area is a mean over the run. A curve that never falls below its start has depth 0 and recovers at once.
    Raises `InputError` for fewer than two points, times that do not ascend, or values that are no finite numbers.
    """
    t, a = np.asarray(times, np.float64), np.asarray(values, np.float64)
    if len(t) < 2 or len(t) != len(a) or not (np.diff(t) > 0).all():
        raise InputError("A gap is read from at least two points in ascending order of time.")
    _refuse_not_finite(t, a)
    ability = a if higher_is_better else -a
    lost = ability[0] - ability
    lowest = first_largest(lost)
    assert lowest is not None  # all of them are finite
    depth = max(0.0, float(lost[lowest]))
    back = np.flatnonzero((np.arange(len(t)) > lowest) & (lost <= 0))
    recovery = float(t[0]) if not depth else float(t[back[0]]) if len(back) else math.inf
    return Gap(float(a[0]), float(a[-1]), depth, float(t[lowest]), recovery, _area(t, lost) / float(t[-1] - t[0]), -float(lost[-1]))


def _refuse_not_finite(times: NDArray[np.float64], values: NDArray[np.float64]) -> None:
    wrong = ~np.isfinite(values)
    if wrong.any():
        raise InputError(
            f"The curve is {values[wrong][0]} at {times[wrong][0]:g} ({int(wrong.sum())} of {len(values)} points are no finite numbers), so nothing can be "
            "read from it; look at that part of the run with `cairn stability`."
        )


def _area(t: np.ndarray, lost: np.ndarray) -> float:
    """Integral of the positive part of a curve that is straight between its points."""
    total = 0.0
    for width, a, b in zip(np.diff(t), lost[:-1], lost[1:], strict=True):
        high, low = max(a, b), min(a, b)
        if high > 0:
            total += width * (high + low) / 2 if low >= 0 else width * high * high / (2 * (high - low))
    return total


def measurable(value: float, stderr: float, chance: float) -> bool:
    """Whether a task can have a gap at all: its value before the change lies more than two standard errors above guessing."""
    return value > chance + 2 * stderr


@dataclass(frozen=True)
class Transition:
    """One continued run seen from both sides, in nats: the initial rise of the old and the new loss, what was forgotten and what gained."""

    name: str
    old_rise: float
    new_rise: float
    old_end: float
    new_end: float
    forgetting: float
    gain: float
    new_area: float
    """Mean of the new loss over the run."""


def transition(name: str, times: ArrayLike, old: ArrayLike, new: ArrayLike) -> Transition:
    """Two loss curves over the same times, the first point before any update, as one line of the comparison."""
    t, u, v = (np.asarray(each, np.float64) for each in (times, old, new))
    for values in (u, v):
        _refuse_not_finite(t, values)
    early = t <= t[0] + EARLY * (t[-1] - t[0])
    mean = float(np.trapezoid(v, t) / (t[-1] - t[0]))
    return Transition(
        name, float(u[early].max() - u[0]), float(v[early].max() - v[0]), float(u[-1]), float(v[-1]), float(u[-1] - u[0]), float(v[0] - v[-1]), mean
    )


def pareto(transitions: Sequence[Transition]) -> list[str]:
    """Names of the runs that no other one beats both in forgetting and in the final loss on the new data."""
    points = [(each.forgetting, each.new_end) for each in transitions]

    def beaten(mine: tuple[float, float]) -> bool:
        return any(other[0] <= mine[0] and other[1] <= mine[1] and other != mine for other in points)

    return [each.name for each, point in zip(transitions, points, strict=True) if not beaten(point)]


def crossing(times: ArrayLike, mine: ArrayLike, other: ArrayLike) -> float:
    """The first time from which on `mine` stays below `other`; infinite if it ends above."""
    below = np.asarray(mine, np.float64) < np.asarray(other, np.float64)
    if not below[-1]:
        return math.inf
    above = np.flatnonzero(~below)
    return float(np.asarray(times, np.float64)[above[-1] + 1 if len(above) else 0])


def curve(run: Run, figure: str, before: float | None = None) -> tuple[list[int], list[float]]:
    """Tokens since the fork and values of one figure of metrics.jsonl, such as `held-out/plays/loss`; `before` is its value at the fork.

    Raises `InputError` where the run has no such figure.
    """
    rows = run.metrics()
    found = [row for row in rows if figure in row]
    if not found:
        known = sorted({key for row in rows for key in row if "/" in key})
        raise InputError(f"{run.path} has no figure '{figure}'.{suggestion(figure, known)} A callback 'evaluate' makes them.")
    begin = rows[0]["tokens"] - run.recipe.training.batch
    first = [] if before is None else [(0, before)]
    points = first + [(row["tokens"] - begin, math.nan if row[figure] is None else row[figure]) for row in found]
    return [time for time, _ in points], [value for _, value in points]


def both_sides(run: Run, old: str, new: str, *, name: str | None = None, before: Mapping[str, Score] | None = None) -> tuple[Transition, Gap]:
    """A continued run seen from its old and its new source, from the figures that its callback `evaluate` left and the state that it began from
    (`before`: what `at_the_fork` found, if it is known)."""
    start = {figure: score.value for figure, score in (at_the_fork(run) if before is None else before).items()}
    times, losses = curve(run, f"held-out/{old}/loss", start.get(f"held-out/{old}/loss"))
    _, gains = curve(run, f"held-out/{new}/loss", start.get(f"held-out/{new}/loss"))
    return transition(name or run.path.name, times, losses, gains), stability_gap(times, losses)


def task_gap(run: Run, figure: str, before: Mapping[str, Score]) -> Gap | None:
    """The gap of an accuracy such as `known-names/import/accuracy`; None where it is not measurable, because the state that the run began from
    (`before`: what `at_the_fork` found) does no better than guessing. Raises `InputError` where either has no such figure."""
    if figure not in before:
        raise InputError(
            f"The state that {run.path} began from has no figure '{figure}'.{suggestion(figure, before)} A callback 'evaluate' names the measurements."
        )
    start = before[figure]
    if start.chance is None:
        raise InputError(f"'{figure}' is not an accuracy: nothing says what guessing would give. Name one, such as 'next-token/accuracy'.")
    times, values = curve(run, figure, start.value)
    return stability_gap(times, values, higher_is_better=True) if measurable(start.value, start.stderr, start.chance) else None


def at_the_fork(run: Run) -> dict[str, Score]:
    """What the run's own `evaluate` callback would have found before the first update: its measurements, taken of the run's parent, by `task/metric`."""
    from cairn import catalog
    from cairn.training.sources import open_recorded

    recipe, parent = run.recipe, _parent(run)
    if parent is None or parent.tokenizer is None:
        return {}
    _, feed = open_recorded(recipe.data, recipe.seed, parent.tokenizer)
    model, found = parent.model(device=choose()).eval(), {}
    for callback in recipe.callbacks:
        for measurement in getattr(callback, "measurements", []) if catalog.name_of(callback) == "evaluate" else []:
            for score in configure(Measurement, measurement).of(model, parent.tokenizer, feed):
                found[f"{score.task}/{score.metric}"] = score
    return found


def _parent(run: Run) -> Checkpoint | None:
    from cairn.checkpoint.format import read

    first = read.open(run.checkpoints()[0])
    parents = first.lineage.parents if first.lineage is not None else []
    return find(parents[0], first.path) if parents else None


@computes
def gap(runs: Sequence[str | Path | Run], old: str, new: str, tasks: Sequence[str] = (), *, device: Any = None) -> dict[str, Any]:
    """Compare continued runs: what each lost of the old data and gained on the new.

    Parameters
    ----------
    runs
        Runs whose callback `evaluate` measures held-out with `by_source=true`.
    old, new
        Names of the old and of the new source.
    tasks
        Accuracies that the callback measures, such as `known-names/import/accuracy`.
    device
        Where the state at the fork is measured, as `cairn.device.choose`.

    Returns
    -------
    dict
        `runs`: a line for each, with the gap of the old loss and of the accuracies (None: not measurable); `pareto`: the names of the runs
        that no other run beats in both forgetting and the new loss.

    Raises
    ------
    InputError
        Where a run did not measure what is asked for.

    Examples
    --------
    >>> cairn.gap(["runs/rewarmed", "runs/kept"], old="books", new="code")["pareto"]  # doctest: +SKIP
    ['rewarmed']

    Source: "Efficient Continual Pre-training by Mitigating the Stability Gap" (arXiv:2406.14833).
    """
    from cairn.training.run import Run

    rows, transitions = [], []
    for run in (each if isinstance(each, Run) else Run(Path(each)) for each in runs):
        before = at_the_fork(run)
        seen, lost = both_sides(run, old, new, before=before)
        found = {figure: task_gap(run, figure, before) for figure in tasks}
        rows.append(asdict(seen) | {"gap": asdict(lost), "tasks": {figure: asdict(each) if each else None for figure, each in found.items()}})
        transitions.append(seen)
    return {"runs": rows, "pareto": pareto(transitions)}
