"""Learning-rate schedules as pure functions of tokens.

A schedule's `factor(tokens, batch)` multiplies the optimizer's learning rate for the update that begins when
`tokens` tokens have been consumed and consumes `batch` more. It depends on nothing else: not on the step at
which a process started, not on how often the run was resumed. Amounts in steps or percent are pinned to tokens
once, when the run begins; a longer `training.tokens` on a resume therefore does not stretch the curve.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Self

from pydantic import Field

from cairn.options import Amount, Options

ZERO = Amount(0, "")
POINTS = ("start", "rewarm_at", "anneal_at")
"""Amounts that are moments of the run; the others are lengths of the schedule."""


Share = Annotated[float, Field(ge=0, le=1)]
"""A share of the learning rate."""


class Schedule(Options, ABC):
    """Base of all schedules: linear warm-up, then `shape`; an origin and a re-warm-up for runs that continue others."""

    catalog_kind: ClassVar[str] = "schedule"

    endless: ClassVar[bool] = False
    """Whether the shape goes on after the horizon."""

    warmup: Amount = ZERO
    """Linear rise to the full rate: the update at t of n warm-up steps has (t + 1) / n of it."""
    horizon: Amount = Amount(100, "%")
    """Where the shape ends; constant afterwards."""
    start: Amount = ZERO
    """Tokens at which this schedule counts zero (a restart in the middle of a run)."""
    rewarm: Amount = ZERO
    """Length of an extra linear rise that begins at `rewarm_at`."""
    rewarm_at: Amount = ZERO

    @abstractmethod
    def shape(self, tokens: float, horizon: float) -> float:
        """The factor after warm-up, `tokens` into a schedule that ends at `horizon` tokens (0 <= tokens <= horizon, or more if endless)."""

    def rise(self, tokens: float, batch: int, length: float) -> float:
        """The factor `tokens` into a warm-up of `length`, at most 1."""
        return (tokens + batch) / length

    def factor(self, tokens: int, batch: int) -> float:
        """Multiplier of the learning rate for the update that takes `tokens` to `tokens + batch`; amounts must be pinned."""
        warmup, horizon, start, rewarm, rewarm_at = (amount.units(batch) for amount in (self.warmup, self.horizon, self.start, self.rewarm, self.rewarm_at))
        ramp = min(1.0, (tokens - rewarm_at + batch) / rewarm) if rewarm and tokens >= rewarm_at else 1.0
        tokens = max(0, tokens - start)  # a run refuses a start that lies ahead of it
        if tokens < warmup:
            return ramp * min(1.0, self.rise(tokens, batch, warmup))
        return ramp * self.shape(tokens if self.endless else min(tokens, horizon), horizon)

    def pinned(self, batch: int, total: int) -> Self:
        """A copy with every amount in tokens, for steps of `batch` tokens in a run of `total`. Lengths in percent are shares of what is left
        of the run from `start` on."""
        start = self.start.units(batch, total)
        left = total - start if start < total else total
        amounts = {key: value for key in type(self).model_fields if isinstance(value := getattr(self, key), Amount)}
        return self.model_copy(update={key: Amount(value.units(batch, total if key in POINTS else left), "") for key, value in amounts.items()})


class Decaying(Schedule):
    """Base of schedules that end below where they began."""

    final: Share = 0.0
    """Share of the learning rate that is left at the horizon and afterwards."""

    def between(self, progress: float) -> float:
        """The factor when `progress` in [0, 1] of the way from 1 down to `final` has been made."""
        return 1.0 - (1.0 - self.final) * progress
