"""Linear decay after warm-up."""

from cairn.catalog import Paper, register
from cairn.training.schedules import Decaying


@register("schedule", "linear", paper=Paper("Straight to Zero: Why Linearly Decaying the Learning Rate to Zero Works Best for LLMs", "arXiv:2502.15938"))
class LinearSchedule(Decaying):
    """Straight line from the end of the warm-up to `final` at the horizon."""

    def shape(self, tokens: float, horizon: float) -> float:
        begin = self.warmup.units(1)
        return self.between((tokens - begin) / (horizon - begin)) if horizon > begin else self.final
