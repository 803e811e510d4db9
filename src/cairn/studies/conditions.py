"""Conditions of a study's check: what must hold, what was found, and whether that shows it.

    judged("loss at the end: scratch minus stack", gains, above(0.05), unit="nats", main=True)      # one figure a seed
    stated("checkpoint at step 40", "bit-equal", str(same), all(same), main=True, always=True)      # nothing to estimate

A figure that differs from seed to seed is an estimate. It shows a condition when the rule that was stated in advance holds (in every seed, on
the mean, in so many seeds) AND the 95 % interval of its mean over the seeds lies on the right side of the threshold; where the interval covers
the threshold nothing is decided, and undecided counts as not shown. A figure that is the same for every seed is no estimate: the rule decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cairn.statistics import mean_interval

Outcome = Literal["shown", "undecided", "not shown"]
Verdict = Literal["holds", "partly", "not at this scale", "fails"]
Rule = Literal["every seed", "mean"] | int
"""Where a figure must lie beyond its bound: in every seed, on the mean over the seeds, or in at least so many of the seeds."""


@dataclass(frozen=True)
class Condition:
    """One condition of a check.

    A `main` condition is part of the paper's claim. One that must hold `always` does not depend on scale: a model of any size that breaks it
    is broken. `interval` is the 95 % interval of the mean over the seeds, where the figure is an estimate.
    """

    name: str
    required: str
    found: str
    outcome: Outcome
    main: bool = False
    always: bool = False
    interval: tuple[float, float] | None = None

    @property
    def shown(self) -> bool:
        return self.outcome == "shown"


class Bound(NamedTuple):
    """Where a figure must lie. It says so in words itself: what is written is what is computed."""

    low: float
    high: float
    strict: bool
    words: str

    def holds(self, value: float) -> bool:
        """Whether a value lies where it must; one that is not a number lies nowhere."""
        return self.low < value < self.high if self.strict else self.low <= value <= self.high

    def excludes(self, low: float, high: float) -> bool:
        """Whether no value of an interval lies where it must."""
        return (high <= self.low or low >= self.high) if self.strict else (high < self.low or low > self.high)


def above(value: float) -> Bound:
    """More than so much."""
    return Bound(value, math.inf, True, f"> {value:g}")


def at_least(value: float) -> Bound:
    """So much or more."""
    return Bound(value, math.inf, False, f">= {value:g}")


def below(value: float) -> Bound:
    """Less than so much."""
    return Bound(-math.inf, value, True, f"< {value:g}")


def at_most(value: float) -> Bound:
    """So much or less."""
    return Bound(-math.inf, value, False, f"<= {value:g}")


def between(low: float, high: float) -> Bound:
    """From so much to so much."""
    return Bound(low, high, False, f"{low:g} to {high:g}")


def stated(name: str, required: str, found: str, holds: bool, *, main: bool = False, always: bool = False) -> Condition:
    """A condition without an estimate in it: equality, a count, a test with a p-value of its own."""
    return Condition(name, required, found, "shown" if holds else "not shown", main, always)


def judged(
    name: str,
    values: Sequence[float],
    bound: Bound,
    *,
    rule: Rule = "every seed",
    unit: str = "",
    form: str = ".3f",
    found: str | None = None,
    main: bool = False,
    always: bool = False,
) -> Condition:
    """A condition on a figure that each seed gives anew.

    Parameters
    ----------
    name, unit, form
        What the figure is, its unit, and the format in which it is printed.
    values
        One figure a seed.
    bound
        Where it must lie.
    rule
        How the study's protocol asks for it: in every seed, on the mean, or in at least so many seeds.
    found
        What is printed instead of the figures, where they are only the difference of what a reader wants to see.
    main, always
        As in `Condition`.

    Examples
    --------
    >>> judged("loss: scratch minus stack", [0.29, 0.27, 0.18], above(0.05), unit="nats").outcome
    'shown'
    >>> judged("loss: scratch minus stack", [0.01, 0.27, 0.18], above(0.05), rule="mean").outcome
    'undecided'
    """
    numbers = [float(value) for value in values]
    interval = _known(mean_interval(numbers)) if all(map(math.isfinite, numbers)) else None
    same = len(numbers) > 1 and len(set(numbers)) == 1
    holds = _stated(numbers, bound, rule)
    outcome: Outcome = ("shown" if holds else "not shown") if same else _outcome(holds, interval, bound)
    required = f"{bound.words}{f' {unit}' if unit else ''}, {_words(rule, len(numbers))}"
    told = ", ".join(f"{value:{form}}" for value in numbers) if found is None else found
    return Condition(name, required, told, outcome, main, always, interval)


def estimated(name: str, required: str, found: str, interval: tuple[float, float], bound: Bound, *, main: bool = False, always: bool = False) -> Condition:
    """A condition on a figure that comes with an interval of its own, over items for example."""
    known = _known(interval)
    return Condition(name, required, found, _outcome(True, known, bound), main, always, known)


def verdict(conditions: Sequence[Condition]) -> Verdict:
    """What the conditions say together.

    `fails` where one that must hold always is not shown, `not at this scale` where a main one is not shown, `holds` where all are shown, else
    `partly`.
    """
    if any(condition.always and not condition.shown for condition in conditions):
        return "fails"
    if any(condition.main and not condition.shown for condition in conditions):
        return "not at this scale"
    return "holds" if all(condition.shown for condition in conditions) else "partly"


def lost(conditions: Sequence[Condition], control: Sequence[Condition]) -> list[str]:
    """The names of the conditions that the honest runs show and the control does not: without one, a check proves nothing."""
    sabotaged = {condition.name: condition.shown for condition in control}
    return [condition.name for condition in conditions if condition.shown and not sabotaged[condition.name]]


def _known(interval: tuple[float, float]) -> tuple[float, float] | None:
    return interval if all(map(math.isfinite, interval)) else None


def _outcome(rule_holds: bool, interval: tuple[float, float] | None, bound: Bound) -> Outcome:
    if interval is None:
        return "undecided" if rule_holds else "not shown"
    if bound.excludes(*interval):
        return "not shown"
    if not (bound.holds(interval[0]) and bound.holds(interval[1])):
        return "undecided"
    return "shown" if rule_holds else "not shown"


def _stated(values: Sequence[float], bound: Bound, rule: Rule) -> bool:
    if rule == "mean":
        return bool(values) and bound.holds(math.fsum(values) / len(values))
    return sum(map(bound.holds, values)) >= (len(values) if rule == "every seed" else rule)


def _words(rule: Rule, count: int) -> str:
    return {"every seed": "in every seed", "mean": "on the mean"}[rule] if isinstance(rule, str) else f"in at least {rule} of {count} seeds"
