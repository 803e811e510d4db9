"""What counts as an answer: a number that is not finite never does, neither as right nor as wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cairn.errors import InputError
from cairn.evaluation.measure import Score
from cairn.statistics import binomial_error

if TYPE_CHECKING:
    from torch import Tensor


def proportion(task: str, metric: str, outcomes: Sequence[bool | None], chance: float | None = None) -> Score:
    """The share of true outcomes; nan where one of them is not known (None), because a share of the others would be that of other items."""
    n = len(outcomes)
    if any(outcome is None for outcome in outcomes):
        return Score(task, metric, math.nan, math.nan, n, chance)
    right = sum(map(bool, outcomes))
    return Score(task, metric, right / n, binomial_error(right, n), n, chance)


def greater(first: float, second: float) -> bool | None:
    """Whether one score is greater than another; None where either is no number."""
    return None if math.isnan(first) or math.isnan(second) else first > second


def right_share(logits: Tensor, targets: Tensor) -> float:
    """The share of rows of logits (n, classes) whose largest is that of the target (n,); nan where a row is not finite."""
    if not bool(logits.isfinite().all()):
        return math.nan
    return float((logits.argmax(-1) == targets).double().mean())


def finite(scores: Sequence[float], what: str) -> None:
    """Raises `InputError` where a score that decides a figure is no number."""
    wrong = sum(map(math.isnan, scores))
    if wrong:
        raise InputError(f"{wrong} of {len(scores)} {what} have no finite log-probability under this model, so nothing can be said of them; check its weights.")
