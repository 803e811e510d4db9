"""Re-warming a finished model: rise to the full rate once more, then half a cosine down.

With n the step in the new run, N its length, W the warm-up, all counted from `start`:

    n < W    max(1, n) / W                                       n >= W   final + (1 - final) (1 + cos(pi (n - W) / (N - W))) / 2

`legacy` is the formula of the code that trained the paper's base models (GPT-NeoX before August 2023): n / W at first, then
max(final, (1 + cos(pi (min(n, N - W) - W) / N)) / 2), which stands still over the last W steps.
"""

from __future__ import annotations

import math
from typing import Literal

from cairn.catalog import Paper, register
from cairn.options import Amount
from cairn.training.schedules import Decaying, Share


@register("schedule", "rewarm", paper=Paper("Continual Pre-Training of Large Language Models: How to (re)warm your model?", "arXiv:2308.04014", card=8))
class Rewarm(Decaying):
    """Linear rise, then cosine to `final`, in the convention of GPT-NeoX; `cairn continue` starts it at the checkpoint."""

    warmup: Amount = Amount(1, "%")
    final: Share = 0.1
    variant: Literal["plain", "legacy"] = "plain"

    def rise(self, tokens: float, batch: int, length: float) -> float:
        return (tokens if self.variant == "legacy" else max(tokens, batch)) / length

    def shape(self, tokens: float, horizon: float) -> float:
        begin = self.warmup.units(1)
        if self.variant == "legacy":
            turned = (min(tokens, horizon - begin) - begin) / horizon if horizon > begin else 1.0
            return max(self.final, 0.5 * (1 + math.cos(math.pi * turned)))
        progress = (tokens - begin) / (horizon - begin) if horizon > begin else 1.0
        return self.between(0.5 * (1 - math.cos(math.pi * progress)))
