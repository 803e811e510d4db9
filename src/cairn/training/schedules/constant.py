"""Constant learning rate after warm-up."""

from cairn.catalog import register
from cairn.training.schedules import Schedule


@register("schedule", "constant")
class Constant(Schedule):
    """Full learning rate after the warm-up, for ever."""

    def shape(self, tokens: float, horizon: float) -> float:
        return 1.0
