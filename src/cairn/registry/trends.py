"""How types of models move over time: slopes that a few odd months do not bend, and types whose uploads and discussion drift apart.

Series of months come from a table (month, type, uploads, discussions); "Deep Learning Model Reuse in the HuggingFace Community", card 13, D and E.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from cairn.errors import InputError, NotFoundError
from cairn.statistics import Z95, percentile_interval, resamples, spearman


@dataclass(frozen=True)
class Slope:
    """A slope per month with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval excludes 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


def theil_sen(values: ArrayLike, z: float = Z95) -> Slope:
    """Median of all pairwise slopes, with Sen's interval from the variance of Kendall's statistic, ties counted.

    P. K. Sen, "Estimates of the regression coefficient based on Kendall's tau", 1968. Raises `InputError` for fewer than three values.
    """
    y = np.asarray(values, np.float64)
    if len(y) < 3:
        raise InputError(f"A slope needs at least three months, not {len(y)}.")
    upper = np.triu_indices(len(y), 1)
    slopes = np.sort((y[upper[1]] - y[upper[0]]) / (upper[1] - upper[0]))
    counts = np.unique(y, return_counts=True)[1].astype(np.float64)
    n = len(y)
    variance = (n * (n - 1) * (2 * n + 5) - float((counts * (counts - 1) * (2 * counts + 5)).sum())) / 18
    half = z * math.sqrt(max(variance, 0.0))
    last = len(slopes) - 1
    high, low = slopes[min(round((len(slopes) + half) / 2), last)], slopes[max(round((len(slopes) - half) / 2) - 1, 0)]
    ends = (float(low), float(high)) if high > low else (math.nan, math.nan)  # a constant series says nothing of its noise
    return Slope(float(np.median(slopes)), *ends)


def growth(counts: ArrayLike, window: int | None = None) -> Slope:
    """Slope of the logarithm of monthly counts (half a count is added, so that an empty month has one), over the last `window` months."""
    array = np.asarray(counts, np.float64)
    return theil_sen(np.log(array[-window if window else 0 :] + 0.5))


@dataclass(frozen=True)
class Divergence:
    """A type of model with both slopes; `flagged` when they have opposite signs and neither interval holds 0."""

    type: str
    share: float
    uploads: Slope
    discussions: Slope
    flagged: bool


@dataclass(frozen=True)
class TrendReport:
    """Types by their uploads, and the rank correlation of uploads and discussions over types."""

    types: list[Divergence]
    spearman: float


def divergence(uploads: Mapping[str, Sequence[float]], discussions: Mapping[str, Sequence[float]], window: int | None = None) -> TrendReport:
    """Where uploads and discussion of a type drift apart."""
    total = sum(sum(series) for series in uploads.values()) or 1.0
    found = []
    for name in sorted(uploads, key=lambda name: -sum(uploads[name])):
        if name in discussions:
            up, talk = growth(uploads[name], window), growth(discussions[name], window)
            found.append(Divergence(name, sum(uploads[name]) / total, up, talk, up.sign * talk.sign == -1))
    sums = [[sum(table[each.type]) for each in found] for table in (uploads, discussions)]
    return TrendReport(found, spearman(*sums))


def trends(table: str | Path, *, window: int | None = None) -> TrendReport:
    """Say which types of models grow, and where uploads and discussion drift apart.

    Parameters
    ----------
    table
        CSV with columns month, type, uploads, discussions.
    window
        Only the last so many months.

    Raises
    ------
    NotFoundError, InputError
        For a table that is not there, lacks a column, or has fewer than three months.

    Examples
    --------
    >>> cairn.trends("uploads.csv").types[0].uploads.value  # doctest: +SKIP

    Source: "Deep Learning Model Reuse in the HuggingFace Community" (card 13, D and E).
    """
    return divergence(*read_table(table), window)


def read_table(path: str | Path) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Monthly uploads and discussions of each type from a CSV with columns month, type, uploads, discussions; absent months count 0."""
    file = Path(path)
    if not file.is_file():
        raise NotFoundError(f"There is no table {file}.")
    cells: dict[tuple[str, str], tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    with file.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        lacking = {"month", "type", "uploads", "discussions"} - set(reader.fieldnames or [])
        if lacking:
            raise InputError(f"{file} has no column '{min(lacking)}'; a table of trends has month, type, uploads, discussions.")
        for number, row in enumerate(reader, 2):
            try:
                before = cells[row["month"], row["type"]]
                cells[row["month"], row["type"]] = before[0] + float(row["uploads"]), before[1] + float(row["discussions"])
            except (TypeError, ValueError):
                raise InputError(f"{file}, line {number}: uploads and discussions are numbers.") from None
    months, types = sorted({month for month, _ in cells}), sorted({kind for _, kind in cells})
    return tuple({kind: [cells[month, kind][place] for month in months] for kind in types} for place in (0, 1))  # type: ignore[return-value]


def documentation(months: ArrayLike, scores: ArrayLike, seed: int = 0, draws: int = 500) -> Slope:
    """Least-squares slope of cards' completeness over the month, with an interval from drawing whole months with replacement.

    Documentation is "not increasing" while the interval reaches down to 0 or below.
    """
    month, score = np.asarray(months, np.float64), np.asarray(scores, np.float64)
    names = np.unique(month)
    if len(names) < 3:
        raise InputError(f"A slope needs at least three months, not {len(names)}.")
    parts = [(month == name).nonzero()[0] for name in names]
    found = []
    for pick in resamples(len(names), draws, seed):
        rows = np.concatenate([parts[place] for place in pick])
        if np.ptp(month[rows]) > 0:
            found.append(np.polyfit(month[rows], score[rows], 1)[0])
    return Slope(float(np.polyfit(month, score, 1)[0]), *percentile_interval(found))


def gini(counts: ArrayLike) -> float:
    """Gini coefficient of counts: 0 when all are equal, near 1 when one has everything."""
    x = np.sort(np.asarray(counts, np.float64))
    total = x.sum()
    n = len(x)
    return float(2 * (np.arange(1, n + 1) * x).sum() / (n * total) - (n + 1) / n) if total > 0 else 0.0


def top_share(counts: ArrayLike, top: int = 10) -> float:
    """Share of the whole that the `top` largest have."""
    x = np.sort(np.asarray(counts, np.float64))[::-1]
    return float(x[:top].sum() / x.sum()) if x.sum() > 0 else 0.0
