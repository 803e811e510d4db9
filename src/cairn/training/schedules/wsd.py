"""Warmup-stable-decay."""

import math
from typing import Literal

from cairn.catalog import Paper, register
from cairn.options import Amount
from cairn.training.schedules import Decaying


@register("schedule", "wsd", paper=Paper("MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies", "arXiv:2404.06395"))
class WarmupStableDecay(Decaying):
    """Full rate until `decay` before the horizon, then down to `final` (section 4.1).

    Before the decay begins the curve does not depend on the horizon: a checkpoint of the stable stretch can be
    continued with any length.
    """

    decay: Amount = Amount(10, "%")
    decay_shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """`sqrt` is 1 - sqrt(progress), steep at first ("Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations")."""

    def shape(self, tokens: float, horizon: float) -> float:
        length = self.decay.units(1)
        if tokens < horizon - length:
            return 1.0
        progress = (tokens - (horizon - length)) / length if length else 1.0
        if self.decay_shape == "cosine":
            progress = 0.5 * (1.0 - math.cos(math.pi * progress))
        elif self.decay_shape == "sqrt":
            progress = math.sqrt(progress)
        return self.between(progress)
