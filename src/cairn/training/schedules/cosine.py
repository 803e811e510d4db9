"""Cosine decay after warm-up."""

import math

from cairn.catalog import Paper, register
from cairn.training.schedules import Decaying, Share


@register("schedule", "cosine", paper=Paper("SGDR: Stochastic Gradient Descent with Warm Restarts", "arXiv:1608.03983"))
class Cosine(Decaying):
    """Half a cosine from the end of the warm-up to `final` at the horizon (section 3, one cycle)."""

    final: Share = 0.1

    def shape(self, tokens: float, horizon: float) -> float:
        begin = self.warmup.units(1)
        progress = (tokens - begin) / (horizon - begin) if horizon > begin else 1.0
        return self.between(0.5 * (1.0 - math.cos(math.pi * progress)))
