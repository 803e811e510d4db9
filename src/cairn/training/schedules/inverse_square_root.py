"""The inverse square root of the tokens, after a stretch at the full rate."""

from __future__ import annotations

import math

from cairn.catalog import Paper, register
from cairn.options import Amount
from cairn.training.schedules import Schedule


@register(
    "schedule",
    "inverse-square-root",
    paper=(
        Paper("Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", "arXiv:1910.10683"),
        Paper("What Language Model Architecture and Pretraining Objective Work Best for Zero-Shot Generalization?", "arXiv:2204.05832", 14),
    ),
)
class InverseSquareRoot(Schedule):
    """Full rate up to `hold`, then sqrt(hold / tokens): 1 / sqrt(max(step, 10000)) with a rate of 0.01 (section 3.1.2). It has no end."""

    hold: Amount = Amount(10_000, "steps")
    """Until when the rate stays."""
    horizon: Amount = Amount(1e18, "")

    def shape(self, tokens: float, horizon: float) -> float:
        return math.sqrt(self.hold.value / max(tokens, self.hold.value, 1.0)) if self.hold.value else 1.0
