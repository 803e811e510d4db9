"""Statistics: no mean without an interval, and no interval of width 0 from a finite sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cairn.randomness import uniform

Z95 = 1.959963984540054


def wilson(successes: float, trials: int, z: float = Z95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson, "Probable inference", 1927); (0, 1) without trials. Never of width 0."""
    if trials == 0:
        return 0.0, 1.0
    share, square = successes / trials, z * z
    centre = (share + square / (2 * trials)) / (1 + square / trials)
    half = z / (1 + square / trials) * math.sqrt(share * (1 - share) / trials + square / (4 * trials * trials))
    # The share itself lies inside, whatever the roundings; where it is 0 or 1 the interval ends there.
    return (max(0.0, min(centre - half, share)) if share else 0.0), (min(1.0, max(centre + half, share)) if share < 1 else 1.0)


def is_proportion(value: float, stderr: float | None, n: int | None) -> bool:
    """Whether a figure is the share of `n` items: the standard error of a share follows from the share itself, with n or n - 1 below the root."""
    if not n or stderr is None or not 0 <= value <= 1:
        return False
    spread = math.sqrt(value * (1 - value))
    return any(math.isclose(stderr, spread / math.sqrt(count), rel_tol=1e-6, abs_tol=1e-12) for count in (n, n - 1) if count > 0)


def interval(value: float, stderr: float | None, n: int | None = None) -> tuple[float, float]:
    """The 95 % interval of a figure; (nan, nan) where it is not known.

    Wilson's interval for a proportion; for other means the normal one. A standard error of 0 from a finite sample of something
    else says that its values were equal, not that the next one will be: the interval is then not known. Never of width 0.

    Examples
    --------
    >>> round(interval(1.0, 0.0, 20)[0], 3)
    0.839
    >>> interval(2.5, 0.0, 20)
    (nan, nan)
    """
    if not math.isfinite(value):
        return math.nan, math.nan
    if is_proportion(value, stderr, n):
        return wilson(value * (n or 0), n or 0)
    if stderr is None or not math.isfinite(stderr) or stderr <= 0:
        return math.nan, math.nan
    return value - Z95 * stderr, value + Z95 * stderr


def error(value: float, stderr: float | None, n: int | None = None) -> float:
    """The standard error of a figure, never 0: where a proportion is 0 or 1, that of its Wilson interval; nan where it is not known."""
    if stderr is not None and math.isfinite(stderr) and stderr > 0:
        return stderr
    low, high = interval(value, stderr, n)
    return (high - low) / (2 * Z95)


def difference(first: float, of_first: tuple[float, float], second: float, of_second: tuple[float, float]) -> tuple[float, float]:
    """The 95 % interval of `second - first`, two independent figures, from the interval of each; (nan, nan) where one is not known.

    The square-and-add rule: Newcombe, "Interval estimation for the difference between independent proportions", 1998, method 10, which
    Zou and Donner, "Construction of confidence limits about effect measures", 2008, show for any two figures. For normal intervals it is
    the usual one.
    """
    (low1, high1), (low2, high2) = of_first, of_second
    apart = second - first
    return apart - math.hypot(second - low2, high1 - first), apart + math.hypot(high2 - second, first - low1)


def mean_interval(values: ArrayLike) -> tuple[float, float]:
    """The 95 % interval of a mean of independent values by Student's t; (nan, nan) for fewer than two values or for equal ones.

    Student, "The probable error of a mean", 1908. Values that are all equal say nothing of their spread.
    """
    array = np.asarray(values, np.float64)
    half = mean_error(array)
    if not math.isfinite(half) or half == 0:
        return math.nan, math.nan
    half *= student(len(array) - 1)
    return float(array.mean()) - half, float(array.mean()) + half


def student(freedom: int, level: float = 0.95) -> float:
    """The value that Student's t with so many degrees of freedom stays within with probability `level`."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """P(|T| <= t) for a whole number of degrees of freedom (Abramowitz and Stegun, "Handbook of mathematical functions", 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    term = total = cosine if freedom % 2 else 1.0
    for step in range(3 if freedom % 2 else 2, freedom, 2):
        term *= cosine * cosine * (step - 1) / step
        total += term
    if not freedom % 2:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0))


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


def first_largest(values: ArrayLike) -> int | None:
    """The number of the largest value, the first of equal ones; None where a value is no number, or none is finite: nothing was chosen then.

    Examples
    --------
    >>> first_largest([1.0, 3.0, 3.0]), first_largest([1.0, float("nan")])
    (1, None)
    """
    array = np.asarray(values, np.float64)
    if not len(array) or np.isnan(array).any() or not math.isfinite(array.max()):
        return None
    return int(array.argmax())


def ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Ranks from 1, ties sharing their mean rank; all nan where a value is no number, which has no rank."""
    array = np.asarray(values, np.float64)
    if np.isnan(array).any():
        return np.full(len(array), math.nan)
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


def percentile_interval(draws: ArrayLike) -> tuple[float, float]:
    """The 95 % percentile interval of resampled values; (nan, nan) where all are equal: then resampling says nothing of the spread."""
    low, high = np.quantile(np.asarray(draws, np.float64), [0.025, 0.975])
    return (float(low), float(high)) if high > low else (math.nan, math.nan)


def resamples(items: int, draws: int, seed: int = 0) -> NDArray[np.int64]:
    """Item numbers drawn with replacement by the counter-based generator, (draws, items)."""
    return (uniform(seed, np.arange(draws * items)) * items).astype(np.int64).reshape(draws, items)


def paired_bootstrap(differences: Sequence[float] | NDArray[np.float64], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of the mean of paired differences, resampled; (nan, nan) where all differences are equal."""
    values = np.asarray(differences, np.float64)
    return percentile_interval(values[resamples(len(values), draws, seed)].mean(axis=1))


def bootstrap(statistic: Callable[[NDArray[np.int64]], float], items: int, seed: int = 0, draws: int = 500) -> tuple[float, float]:
    """95 % percentile interval of a statistic of item numbers, items drawn with replacement; paired when it looks at several models.

    Draws in which it is undefined (nan) are left out; (nan, nan) when it is undefined in most of them, or the same in all.
    """
    found = np.array([statistic(pick) for pick in resamples(items, draws, seed)])
    found = found[~np.isnan(found)]
    return percentile_interval(found) if len(found) >= draws / 2 else (math.nan, math.nan)


def paired_proportions(before: ArrayLike, after: ArrayLike) -> tuple[float, float]:
    """The 95 % interval of the change of a proportion on the same items, share of `after` minus share of `before` (booleans).

    Newcombe, "Improved confidence intervals for the difference between binomial proportions based on paired data", 1998, method 10.
    Never of width 0, not even where nothing changes.
    """
    first, second = np.asarray(before, bool), np.asarray(after, bool)
    n = len(first)
    if not n:
        return -1.0, 1.0
    both, lost, won = int((first & second).sum()), int((first & ~second).sum()), int((~first & second).sum())
    neither = n - both - lost - won
    product = both * neither - lost * won
    margins = (both + lost) * (won + neither) * (both + won) * (lost + neither)
    phi = (max(product - n / 2, 0.0) if product > 0 else product) / math.sqrt(margins) if margins else 0.0
    (low1, high1), (low2, high2) = wilson(both + lost, n), wilson(both + won, n)
    p1, p2 = (both + lost) / n, (both + won) / n
    down = math.sqrt(max((p2 - low2) ** 2 - 2 * phi * (p2 - low2) * (high1 - p1) + (high1 - p1) ** 2, 0.0))
    up = math.sqrt(max((high2 - p2) ** 2 - 2 * phi * (high2 - p2) * (p1 - low1) + (p1 - low1) ** 2, 0.0))
    return p2 - p1 - down, p2 - p1 + up


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
    """p-value of each value: the share of a control set that is as large or larger, itself counted in. Valid for any distribution;
    nan for what is no number."""
    known, asked = np.sort(np.asarray(control, np.float64)), np.asarray(values, np.float64)
    if np.isnan(known).any():
        return np.full(len(asked), math.nan)
    found = (1 + len(known) - np.searchsorted(known, asked, side="left")) / (len(known) + 1)
    return np.where(np.isnan(asked), math.nan, found)


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
