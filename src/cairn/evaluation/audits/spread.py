"""The spread of a score over equivalent prompts: found under a budget, and read against the spread of noise.

The largest minus the smallest of noisy means is positive even where nothing differs, so a spread never stands without the one
that chance makes of the same number of items and formats, and its ends are scored again on items that did not choose them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cairn.evaluation.grammar import PromptFormat
from cairn.randomness import seed_for, uniform
from cairn.statistics import bootstrap, resamples, spread_null

Pull = Callable[[int, int, int], NDArray[np.float64]]
"""Outcomes (end - begin,) of one format on a stretch of the items: `pull(format, begin, end)`."""
PRIOR = 5.0
"""Failures that every format begins with."""


@dataclass(frozen=True)
class SpreadResult:
    """The formats at both ends, and how many outcomes were looked at to find them."""

    low: int
    high: int
    calls: int


def thompson(pull: Pull, formats: int, items: int, budget: int, *, default: float, batch: int = 20, seed: int = 0) -> SpreadResult:
    """The best and the worst of `formats` by Thompson sampling, half of `budget` outcomes for each (section 4.2).

    `default` is the accuracy of the usual format; it centres the prior Beta(max(1.1, 5x / (1 - x)), 5), clipped away from 0 and 1.
    Each step draws an accuracy for every format that is not yet fully looked at, and looks at the next `batch` items of the most
    extreme one; the second search keeps the counts of the first.
    """
    chooser = np.random.default_rng(seed_for(seed, "thompson"))
    share = min(0.98, max(0.02, default))
    prior = max(1.1, PRIOR * share / (1 - share))
    won, seen, calls = np.zeros(formats), np.zeros(formats, np.int64), 0
    for sign, limit in ((1.0, budget // 2), (-1.0, budget)):
        while calls < limit and (seen < items).any():
            drawn = np.where(seen < items, sign * chooser.beta(prior + won, PRIOR + seen - won), -np.inf)
            chosen = int(drawn.argmax())
            end = min(items, int(seen[chosen]) + batch, int(seen[chosen]) + limit - calls)
            outcomes = pull(chosen, int(seen[chosen]), end)
            won[chosen] += outcomes.sum()
            calls += end - int(seen[chosen])
            seen[chosen] = end
    # Posterior means, where the published code takes plain ones: a format that was looked at once, with luck, would win.
    means = (prior + won) / (prior + PRIOR + seen)
    return SpreadResult(int(np.where(seen > 0, means, np.inf).argmin()), int(np.where(seen > 0, means, -np.inf).argmax()), calls)


def equal_shares(pull: Pull, formats: int, items: int, budget: int) -> SpreadResult:
    """The best and the worst when every format is looked at equally often: what a budgeted search has to beat."""
    each = min(items, budget // formats)
    means = [float(pull(format_, 0, each).mean()) for format_ in range(formats)]
    return SpreadResult(int(np.argmin(means)), int(np.argmax(means)), each * formats)


@dataclass(frozen=True)
class Spread:
    """Scores over formats: the ends, the spread and what noise alone would show, all from outcomes of the same items."""

    low: float
    high: float
    spread: float
    null: float
    """Mean spread when formats do not differ."""
    excess: tuple[float, float]
    """95 % interval of the spread beyond the null, items drawn again."""
    p: float
    """Share of null spreads at least as large."""
    held_out: float
    """Spread on one half of the items between the formats that the other half found best and worst: without winner's curse, may be negative."""
    quantiles: tuple[float, float]
    """5 % and 95 % of the formats' scores, which do not grow with their number."""


def spread_of(outcomes: ArrayLike, seed: int = 0, draws: int = 300) -> Spread:
    """From outcomes (formats, items), every format on every item."""
    table = np.asarray(outcomes, np.float64)
    means = table.mean(axis=1)
    null = spread_null(table, seed, draws)
    spread, expected = float(means.max() - means.min()), float(null.mean())

    def again(picks: NDArray[np.int64]) -> float:
        drawn = table[:, picks].mean(axis=1)
        return float(drawn.max() - drawn.min())

    # Drawing items again adds noise of its own, and with it spread: the interval is moved back by what it adds on the average.
    low, high = bootstrap(again, table.shape[1], seed, draws)
    shift = float(np.mean([again(pick) for pick in resamples(table.shape[1], draws, seed)])) - spread
    order = np.argsort(uniform(seed_for(seed, "halves"), np.arange(table.shape[1])), kind="stable")
    halves = table[:, order[::2]], table[:, order[1::2]]
    held_out = [float(other[one.mean(axis=1).argmax()].mean() - other[one.mean(axis=1).argmin()].mean()) for one, other in (halves, halves[::-1])]
    return Spread(
        low=float(means.min()),
        high=float(means.max()),
        spread=spread,
        null=expected,
        excess=(low - shift - expected, high - shift - expected),
        p=float((1 + (null >= spread - 1e-12).sum()) / (draws + 1)),
        held_out=float(np.mean(held_out)),
        quantiles=(float(np.quantile(means, 0.05)), float(np.quantile(means, 0.95))),
    )


def slot_effects(formats: list[PromptFormat], means: ArrayLike) -> dict[str, dict[str, float]]:
    """By how much the formats with each value of each part lie above the mean of all, by least squares over all parts at once."""
    slots = [format_.slots() for format_ in formats]
    names = [(slot, value) for slot in slots[0] for value in sorted({each[slot] for each in slots})]
    design = np.array([[float(each[slot] == value) for slot, value in names] for each in slots])
    values = np.asarray(means, np.float64)
    # Centred columns and the smallest solution: each part's effects are differences from the mean, whichever values were drawn.
    fitted = np.linalg.lstsq(design - design.mean(axis=0), values - values.mean(), rcond=None)[0]
    found: dict[str, dict[str, float]] = {}
    for (slot, value), effect in zip(names, fitted, strict=True):
        found.setdefault(slot, {})[value] = float(effect)
    return found


def order_flip(a: ArrayLike, b: ArrayLike, default: int = 0, seed: int = 0, draws: int = 500) -> dict[str, float]:
    """Probability that two checkpoints stand in another order under a random format than under the default one.

    a, b: outcomes (formats, items) of the same formats and items. A tie counts half. `low` and `high`: 95 % over the items.
    """
    gaps = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    sign = np.sign(gaps[default].mean())

    def flips(picks: NDArray[np.int64]) -> float:
        means = gaps[:, picks].mean(axis=1)
        against = -means * (sign or 1.0)
        return float((against > 0).mean() + 0.5 * (against == 0).mean())

    low, high = bootstrap(flips, gaps.shape[1], seed, draws)
    return {"flip": flips(np.arange(gaps.shape[1])), "low": low, "high": high, "default_gap": float(gaps[default].mean())}
