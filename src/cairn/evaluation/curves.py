"""What the curve of a task over training says: its phase, how smooth it is, whether it repeats at other sizes, and what it predicts.

All functions take plain arrays; `analyse` applies them to the tidy table. Phases, decision steps and the two baselines of prediction
are our construction; the questions are those of "The Fine Line" (2404.01204).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cairn.errors import InputError
from cairn.statistics import isotonic, kendall, pearson, percentile_interval, resamples

Array = NDArray[np.float64]
Phase = Literal["floor", "rise", "plateau"]
LASTING = 3
"""Checkpoints in a row above the floor before a rise counts as one."""


def normalised(values: ArrayLike, chance: float, ceiling: float = 1.0) -> Array:
    """(value - chance) / (ceiling - chance): 0 is guessing, 1 is all right."""
    return (np.asarray(values, np.float64) - chance) / (ceiling - chance)


def onset(values: ArrayLike, errors: ArrayLike, chance: float) -> int | None:
    """Number of the first checkpoint from which `LASTING` in a row lie above chance by two standard errors; None: none does.

    One checkpoint of forty lies there by luck; three in a row in 27 do in fewer than one table of a thousand.
    """
    above = np.asarray(values, np.float64) > chance + 2 * np.asarray(errors, np.float64)
    for begin in range(len(above) - LASTING + 1):
        if above[begin : begin + LASTING].all():
            return begin
    return None


def phases(values: ArrayLike, errors: ArrayLike, chance: float, tokens: ArrayLike) -> list[Phase]:
    """The phase of each checkpoint: `floor` before the onset, then `rise`; `plateau` over the last third where it no longer moves."""
    begin, count = onset(values, errors, chance), len(np.asarray(values))
    found: list[Phase] = ["floor"] * count
    if begin is None:
        return found
    last = max(begin, count - count // 3)
    flat = count - last >= 3 and not slopes(np.log(np.maximum(np.asarray(tokens, np.float64)[last:], 1)), np.asarray(values, np.float64)[last:])
    found[begin:last] = ["rise"] * (last - begin)
    found[last:] = ["plateau" if flat else "rise"] * (count - last)
    return found


def slopes(x: Array, y: Array, alpha: float = 0.05) -> bool:
    """Whether a least-squares line through (x, y) has a slope other than 0 (two-sided t-test)."""
    from scipy import stats

    if np.ptp(y) == 0:
        return False
    return bool(stats.linregress(x, y).pvalue < alpha)


@dataclass(frozen=True)
class Smoothness:
    """Kendall's tau between time and value, share of pairs of neighbours that fall by more than two standard errors, and the
    standard deviation around the nearest non-decreasing curve."""

    tau: float
    drops: float
    scatter: float


def smoothness(values: ArrayLike, errors: ArrayLike) -> Smoothness:
    """How steadily a curve rises."""
    v, e = np.asarray(values, np.float64), np.asarray(errors, np.float64)
    falls = v[:-1] - v[1:] > 2 * np.sqrt(e[:-1] ** 2 + e[1:] ** 2)
    return Smoothness(kendall(np.arange(len(v)), v), float(falls.mean()) if len(falls) else 0.0, float((v - isotonic(v)).std()))


def similarity(curves: Mapping[str, Mapping[int, float]]) -> tuple[float, float]:
    """Mean and least Pearson correlation over all pairs of runs, each pair on its common checkpoints (step -> value)."""
    found = []
    for a, b in combinations(sorted(curves), 2):
        common = sorted(set(curves[a]) & set(curves[b]))
        found.append(pearson([curves[a][step] for step in common], [curves[b][step] for step in common]))
    if not found:
        raise InputError("Similarity needs the curves of at least two runs.")
    return float(np.mean(found)), float(np.min(found))


def decision_step(curves: Mapping[str, Mapping[int, float]], least: float = 0.8) -> tuple[int | None, dict[int, float]]:
    """The earliest checkpoint from which on the ranking of the runs has Kendall's tau of at least `least` with the last one, and
    tau at each checkpoint that all runs have."""
    common = sorted(set.intersection(*(set(curve) for curve in curves.values())))
    final = [curve[common[-1]] for curve in curves.values()]
    taus = {step: kendall([curve[step] for curve in curves.values()], final) for step in common}
    decided = None
    for step in reversed(common):
        if not taus[step] >= least:
            break
        decided = step
    return decided, taus


@dataclass(frozen=True)
class Prediction:
    """How well an unseen group is predicted: mean absolute error, and R2 against the mean of what was fitted on."""

    error: float
    r2: float


def left_out(features: Array, target: Array, groups: Sequence[object]) -> Prediction:
    """Least squares with a constant, fitted on all groups but one and judged on that one, for each in turn.

    features (n, k), target (n,), groups (n,): rows of one group are never used to predict each other.
    """
    labels = np.array([str(group) for group in groups])
    missed, explained, total = [], 0.0, 0.0
    for group in dict.fromkeys(labels.tolist()):
        out = labels == group
        design = np.column_stack([features, np.ones(len(features))])
        weights = np.linalg.lstsq(design[~out], target[~out], rcond=None)[0]
        residual = design[out] @ weights - target[out]
        missed.append(np.abs(residual))
        explained += float((residual**2).sum())
        total += float(((target[out] - target[~out].mean()) ** 2).sum())
    return Prediction(float(np.concatenate(missed).mean()), 1 - explained / total if total else math.nan)


def promotion(curves: Sequence[tuple[ArrayLike, ArrayLike]], lag: int, draws: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """Correlation of the steps of one domain with those of another `lag` checkpoints later, and its 95 % interval over runs.

    curves: for each run the means of both domains at its checkpoints. Runs are resampled whole: neighbours in a run are not independent.
    """
    pairs = []
    for first, second in curves:
        a, b = np.diff(np.asarray(first, np.float64)), np.diff(np.asarray(second, np.float64))
        pairs.append((a[: len(a) - lag], b[lag:]))

    def correlation(chosen: Sequence[int]) -> float:
        return pearson(np.concatenate([pairs[i][0] for i in chosen]), np.concatenate([pairs[i][1] for i in chosen]))

    low, high = percentile_interval([correlation(pick.tolist()) for pick in resamples(len(pairs), draws, seed)])
    return correlation(range(len(pairs))), low, high


@dataclass(frozen=True)
class PowerLaw:
    """value = c - a * tokens^-b, with the bootstrap standard error and 95 % interval of b."""

    a: float
    b: float
    c: float
    error: float
    interval: tuple[float, float]


FEWEST = 8
"""Checkpoints that a power law is fitted to at least."""


def power_law(tokens: ArrayLike, values: ArrayLike, draws: int = 200, seed: int = 0) -> PowerLaw:
    """Fit value = c - a * tokens^-b (a > 0, b > 0) to the checkpoints after the floor; b by a grid of its logarithm, a and c by least squares.

    Raises `InputError` with fewer than eight checkpoints or where the interval of b covers 0: such a curve says nothing of its limit.
    """
    x, y = np.asarray(tokens, np.float64), np.asarray(values, np.float64)
    if len(x) < FEWEST:
        raise InputError(f"A power law needs at least {FEWEST} checkpoints after the floor, not {len(x)}.")
    fit = _fitter(x / x.min())
    b, a, c = fit(y)
    residual = y - (c - a * (x / x.min()) ** -b)
    centred = residual - residual.mean()
    found = np.array([fit(y - residual + centred[pick])[0] for pick in resamples(len(x), draws, seed)])
    low, high = percentile_interval(found)
    if low <= EXPONENTS[0] or a <= 0:
        raise InputError("The curve does not bend as a power law: the interval of its exponent covers 0.")
    return PowerLaw(a * float(x.min()) ** b, b, c, float(found.std(ddof=1)), (low, high))


EXPONENTS = np.geomspace(0.005, 3, 600)


def _fitter(x: Array) -> Callable[[Array], tuple[float, float, float]]:
    """Least squares over the grid of exponents at once: y to (b, a, c)."""
    curves = x[None] ** -EXPONENTS[:, None]
    centred = curves - curves.mean(1, keepdims=True)
    norms = (centred**2).sum(1)

    def fit(y: Array) -> tuple[float, float, float]:
        gains = -(centred @ (y - y.mean())) / norms
        errors = (((y - y.mean())[None] + gains[:, None] * centred) ** 2).sum(1)
        best = int(np.argmin(np.where(gains > 0, errors, np.inf))) if (gains > 0).any() else 0
        return float(EXPONENTS[best]), float(gains[best]), float(y.mean() + gains[best] * curves[best].mean())

    return fit
