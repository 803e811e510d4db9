"""Statistics: no mean without an interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cairn.randomness import uniform

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


def bootstrap(statistic: Callable[[NDArray[np.int64]], float], items: int, seed: int = 0, draws: int = 500) -> tuple[float, float]:
    """95 % percentile interval of a statistic of item numbers, items drawn with replacement; paired when it looks at several models.

    Draws in which it is undefined (nan) are left out; (nan, nan) when it is undefined in most of them.
    """
    picks = (uniform(seed, np.arange(draws * items)) * items).astype(np.int64).reshape(draws, items)
    found = np.array([statistic(pick) for pick in picks])
    found = found[~np.isnan(found)]
    if len(found) < draws / 2:
        return math.nan, math.nan
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def kendall(a: ArrayLike, b: ArrayLike) -> float:
    """Kendall's tau-b, (concordant - discordant) / sqrt of the pairs untied in a times those untied in b; nan where one side is constant."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    upper = np.triu_indices(len(x), 1)
    dx, dy = np.sign(x[:, None] - x)[upper], np.sign(y[:, None] - y)[upper]
    untied = float((dx != 0).sum()) * float((dy != 0).sum())
    return float((dx * dy).sum() / math.sqrt(untied)) if untied else math.nan


def kendall_p(a: ArrayLike, b: ArrayLike, seed: int = 0, draws: int = 2000) -> float:
    """One-sided p-value of tau-b > 0 under random pairings; nan where tau is."""
    x, found = np.asarray(b, np.float64), kendall(a, b)
    if math.isnan(found):
        return math.nan
    orders = np.argsort(uniform(seed, np.arange(draws * len(x))).reshape(draws, len(x)), axis=1)
    return float((1 + sum(kendall(a, x[order]) >= found - 1e-12 for order in orders)) / (draws + 1))


def binomial_tail(successes: int, trials: int, chance: float) -> float:
    """Probability of at least so many successes: the one-sided exact binomial test."""
    if successes <= 0:
        return 1.0
    if chance <= 0 or chance >= 1:
        return float(chance >= 1)
    return min(1.0, sum(math.exp(_log_choose(trials, k) + k * math.log(chance) + (trials - k) * math.log1p(-chance)) for k in range(successes, trials + 1)))


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p-value that items change sides as often one way as the other (McNemar, 1947); 1 where nothing changes."""
    return min(1.0, 2 * binomial_tail(max(lost, won), lost + won, 0.5)) if lost + won else 1.0


def fisher(successes: int, trials: int, control_successes: int, control_trials: int) -> float:
    """One-sided p-value that a proportion is larger than the one of a control set, whose own noise counts too (Fisher's exact test)."""
    total = successes + control_successes
    both = _log_choose(trials + control_trials, total)
    reachable = range(successes, min(trials, total) + 1)
    return min(1.0, sum(math.exp(_log_choose(trials, k) + _log_choose(control_trials, total - k) - both) for k in reachable if total - k <= control_trials))


def rank_sum(values: ArrayLike, control: ArrayLike) -> tuple[float, float]:
    """(AUC, one-sided p): how often a value exceeds one of the control, ties half, and whether more than by chance.

    Mann and Whitney's test by the normal approximation with ties and continuity; p is 1 where all values are equal.
    """
    x, y = np.asarray(values, np.float64), np.asarray(control, np.float64)
    n, m = len(x), len(y)
    total = n + m
    larger = ranks(np.concatenate([x, y]))[:n].sum() - n * (n + 1) / 2
    _, ties = np.unique(np.concatenate([x, y]), return_counts=True)
    variance = n * m / 12 * (total + 1 - (ties**3 - ties).sum() / (total * (total - 1)))
    z = (larger - n * m / 2 - 0.5) / math.sqrt(variance) if variance > 0 else -math.inf
    return float(larger / (n * m)), 0.5 * math.erfc(z / math.sqrt(2))


def calibrated(values: ArrayLike, control: ArrayLike) -> NDArray[np.float64]:
    """p-value of each value: the share of a control set that is as large or larger, itself counted in. Valid for any distribution."""
    known = np.sort(np.asarray(control, np.float64))
    return (1 + len(known) - np.searchsorted(known, np.asarray(values, np.float64), side="left")) / (len(known) + 1)


def false_discovery(p_values: ArrayLike) -> NDArray[np.float64]:
    """q-values of Benjamini and Hochberg ("Controlling the False Discovery Rate", 1995): flag q <= f and a share f of the flags is false."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p)
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    found = np.empty_like(p)
    found[order] = np.minimum(1.0, np.minimum.accumulate(scaled[::-1])[::-1])
    return found


def spread_null(outcomes: ArrayLike, seed: int = 0, draws: int = 500) -> NDArray[np.float64]:
    """Spreads (largest minus smallest row mean) that rows (R, N) would show if they did not differ, shape (draws,).

    The outcomes of each item are permuted among the rows: the spread of noise alone, which is never 0.
    """
    table = np.asarray(outcomes, np.float64)
    found = np.empty(draws)
    for draw in range(draws):
        order = np.argsort(uniform(seed, draw * table.size + np.arange(table.size)).reshape(table.shape), axis=0)
        means = np.take_along_axis(table, order, axis=0).mean(axis=1)
        found[draw] = means.max() - means.min()
    return found


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
