"""A search for coefficients with a budget: the given options first, then points spread over the space, then steps around the best.

No gradients, no state: which points are tried depends on the seed, the budget and what was found so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cairn import catalog, randomness
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating.stream import Operation
from cairn.errors import InputError
from cairn.merging.coefficients import Range
from cairn.merging.target import Bench, MergeTarget
from cairn.options import configure


@dataclass(frozen=True)
class SearchResult:
    """The best options, their value on the data that choose (None where nothing was tried), and every trial."""

    options: dict[str, Any]
    value: float | None
    trials: list[dict[str, Any]]


def space_of(method: str) -> dict[str, Range]:
    """What there is to tune about a method; empty if nothing."""
    return dict(getattr(catalog.get(Operation, method).implementation, "space", {}))


def minimise(function: Callable[[np.ndarray], float], dimensions: int, budget: int, seed: int = 0, first: Sequence[float] | None = None) -> np.ndarray:
    """The point of [0, 1]^dimensions at which `function` was least of `budget` tries, of which `first` is one."""
    points: list[np.ndarray] = [np.asarray(first, float)] if first is not None else []
    points += list(spread(budget - len(points) - (budget - len(points)) // 2, dimensions, seed))
    values = [function(point) for point in points[:budget]]
    best = int(np.argmin(values)) if values else 0
    reach = 0.25
    for number in range(len(values), budget):
        angle = randomness.uniform(randomness.seed_for(seed, "step", number), np.arange(2 * dimensions))
        # Box and Muller: a normal step from two uniform numbers a dimension.
        step = np.sqrt(-2 * np.log1p(-angle[:dimensions])) * np.cos(2 * np.pi * angle[dimensions:])
        points.append(np.clip(points[best] + reach * step, 0, 1))
        values.append(function(points[-1]))
        if values[-1] < values[best]:
            best = number
        else:
            reach = max(0.02, reach * 0.85)
    return points[best]


def spread(count: int, dimensions: int, seed: int) -> np.ndarray:
    """`count` points that fill [0, 1]^dimensions evenly: an additive recurrence on the root of x^(d+1) = x + 1, shifted by the seed."""
    root = 2.0
    for _ in range(64):
        root = (1 + root) ** (1 / (dimensions + 1))
    steps = root ** -np.arange(1.0, dimensions + 1)
    shift = randomness.uniform(randomness.seed_for(seed, "spread"), np.arange(dimensions))
    return (shift + np.arange(1, count + 1)[:, None] * steps) % 1.0


def search(
    method: str,
    bench: Bench,
    objective: MergeTarget,
    budget: int,
    options: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    parents: Sequence[Checkpoint] | None = None,
) -> SearchResult:
    """Tune what `method` leaves open, at most `budget` merges, beginning with `options` as they are; budget 0 returns those.

    Options that are given are not tuned. Raises `InputError` for a negative budget.
    """
    given = dict(options or {})
    if budget < 0:
        raise InputError(f"A budget of {budget} trials is not possible; 0 tries nothing.")
    if budget == 0:
        return SearchResult(given, None, [])
    parents = bench.parents if parents is None else parents
    based = getattr(catalog.get(Operation, method).implementation, "based", False)
    open_ranges = {key: item for key, item in space_of(method).items() if key not in given}
    widths = {key: len(parents) - based if item.each else 1 for key, item in open_ranges.items()}
    trials: list[dict[str, Any]] = []

    def attempt(chosen: dict[str, Any]) -> float:
        score = bench.score(configure(Operation, {"name": method, **chosen}), objective.select, parents)
        trials.append({"options": chosen, "value": score.value})
        return _badness(score.value, objective.lower)

    attempt(given)
    if open_ranges:
        minimise(lambda point: attempt(given | _options(open_ranges, widths, point)), sum(widths.values()), budget - 1, seed)
    best = min(trials, key=lambda trial: _badness(trial["value"], objective.lower))
    if not math.isfinite(best["value"]):
        raise InputError(f"No merge by {method} measures as a finite number: the first gave {trials[0]['value']}. The checkpoints or the data are damaged.")
    return SearchResult(best["options"], best["value"], trials)


def _badness(value: float, lower: bool) -> float:
    """What is to be small; a value that is not a number is worse than any other."""
    return math.inf if math.isnan(value) else value if lower else -value


def _options(ranges: Mapping[str, Range], widths: Mapping[str, int], point: np.ndarray) -> dict[str, Any]:
    found, taken = {}, 0
    for key, item in ranges.items():
        values = [round(float(item.at(share)), 6) for share in point[taken : taken + widths[key]]]
        taken += widths[key]
        found[key] = [max(value, 1e-6) for value in values] if item.each else values[0]
    return found
