"""The infinite schedule: a trunk that never ends, and annealing branches off it.

    warm-up    n < w           (n + 1) / w
    cooldown   w <= n < c      k + (1 - k) (1 + cos(pi x)) / 2,  or  1 + (k - 1) h(x) / h(1);   x = (n - w) / (c - w)
    constant   n >= c          k
    annealing  n >= a          r (f / r)^((n - a) / A),  r the factor at a;  f from a + A on

h(x) = 1 / sqrt(1 + s x) - 1. All but the annealing depend on nothing that comes later, so that a trunk can be prolonged at any
time without a change of what it has done. With c = w and k = 1 it is warm-up, stable, exponential decay.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from cairn.catalog import Paper, register
from cairn.options import Amount
from cairn.training.schedules import ZERO, Schedule


def inverse_root(progress: float, steepness: float) -> float:
    """How much of the way down has been made, from 0 to 1, when `progress` in [0, 1] of the time has passed."""
    return (1 / math.sqrt(1 + steepness * progress) - 1) / (1 / math.sqrt(1 + steepness) - 1)


def annealed(rate: float, final: float, progress: float) -> float:
    """Exponentially from `rate` to `final`, both positive, as `progress` goes from 0 to 1; `final` afterwards."""
    return rate * (final / rate) ** min(1.0, progress)


@register(
    "schedule",
    "infinite",
    paper=(
        Paper("Beyond Cosine Decay: On the effectiveness of Infinite Learning Rate Schedule for Continual Pre-training", "arXiv:2503.02844", card=87),
        Paper("Simple and Scalable Strategies to Continually Pre-train Large Language Models", "arXiv:2403.08763"),
    ),
)
class Infinite(Schedule):
    """Down once to a constant rate that holds over any number of data sets; models for use are annealed branches."""

    endless: ClassVar[bool] = True

    cooldown: Amount = Amount(50, "%")
    """Where the constant stretch begins, counted from `start`."""
    constant: float = Field(0.5, gt=0, le=1)
    """Share of the learning rate that holds for ever."""
    cooldown_shape: Literal["cosine", "inverse-sqrt"] = "cosine"
    steepness: float = Field(9.0, gt=0)
    """s of the inverse square root; the papers give no value."""
    anneal: Amount = ZERO
    """Length of the annealing; 0: this is the trunk."""
    anneal_at: Amount = ZERO
    """Tokens at which the annealing begins; `cairn anneal` sets it to those of the checkpoint."""
    final: float = Field(0.05, gt=0, le=1)
    """Share of the learning rate at the end of the annealing."""

    @model_validator(mode="after")
    def _downward(self) -> Self:
        if self.final > self.constant:
            raise ValueError(f"annealing goes down: final ({self.final}) must not be above constant ({self.constant}).")
        return self

    def shape(self, tokens: float, horizon: float) -> float:
        length, begin = self.anneal.units(1), self.anneal_at.units(1) - self.start.units(1)
        if not length or tokens < begin:
            return self._trunk(tokens)
        return annealed(self._trunk(max(begin, self.warmup.units(1))), self.final, (tokens - begin) / length)

    def _trunk(self, tokens: float) -> float:
        begin, end = self.warmup.units(1), self.cooldown.units(1)
        if tokens >= end:
            return self.constant
        progress = (tokens - begin) / (end - begin)
        if self.cooldown_shape == "cosine":
            return self.constant + (1 - self.constant) * 0.5 * (1 + math.cos(math.pi * progress))
        return 1 + (self.constant - 1) * inverse_root(progress, self.steepness)
