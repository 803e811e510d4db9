"""Statistics: no mean without an interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cairn.data.random import uniform

Z95 = 1.959963984540054


def wilson(successes: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson, "Probable inference", 1927); (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share, square = successes / trials, z * z
    centre = (share + square / (2 * trials)) / (1 + square / trials)
    half = z / (1 + square / trials) * math.sqrt(share * (1 - share) / trials + square / (4 * trials * trials))
    return centre - half, centre + half


def binomial_error(successes: int, trials: int) -> float:
    """Standard error of a proportion."""
    share = successes / trials
    return math.sqrt(share * (1 - share) / trials)


def mean_error(values: ArrayLike) -> float:
    """Standard error of a mean of independent values; nan for fewer than two."""
    array = np.asarray(values, np.float64)
    return float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else math.nan


def ratio(numerators: ArrayLike, denominators: ArrayLike) -> tuple[float, float]:
    """Ratio of sums over independent units and its standard error (linearised, as for a ratio estimator)."""
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    value = top.sum() / bottom.sum()
    count = len(top)
    if count < 2:
        return float(value), math.nan
    return float(value), float(np.sqrt(count / (count - 1) * ((top - value * bottom) ** 2).sum()) / bottom.sum())


def ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Ranks from 1, ties sharing their mean rank."""
    array = np.asarray(values, np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Rank correlation; nan where one side is constant or fewer than two pairs are given: undefined stays undefined."""
    x, y = ranks(a), ranks(b)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def kendall(a: ArrayLike, b: ArrayLike) -> float:
    """Kendall's tau-b; nan where one side is constant or fewer than two pairs are given."""
    x, y = (np.asarray(side, np.float64) for side in (a, b))
    i, j = np.triu_indices(len(x), 1)
    first, second = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
    size = math.sqrt(float((first != 0).sum()) * float((second != 0).sum()))
    return float((first * second).sum()) / size if size else math.nan


def pearson(a: ArrayLike, b: ArrayLike) -> float:
    """Linear correlation; 0 where one side is constant, which says nothing of the other; nan for fewer than two pairs."""
    x, y = (np.asarray(side, np.float64) for side in (a, b))
    if len(x) < 2:
        return math.nan
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def isotonic(values: ArrayLike) -> NDArray[np.float64]:
    """The non-decreasing sequence nearest in least squares (pool adjacent violators)."""
    blocks: list[list[float]] = []
    for value in np.asarray(values, np.float64).tolist():
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, count = blocks.pop()
            before, earlier = blocks[-1]
            blocks[-1] = [(before * earlier + mean * count) / (earlier + count), earlier + count]
    return np.repeat([mean for mean, _ in blocks], [int(count) for _, count in blocks])


def paired_bootstrap(differences: Sequence[float] | NDArray[np.float64], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of the mean of paired differences, resampled by the counter-based generator."""
    values = np.asarray(differences, np.float64)
    picks = (uniform(seed, np.arange(draws * len(values))) * len(values)).astype(np.int64).reshape(draws, len(values))
    means = values[picks].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
