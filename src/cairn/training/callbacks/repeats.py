"""How often the sources of a mixture are read, and an end to it where that is wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from cairn.catalog import Paper, register
from cairn.training.callbacks import Handler, PeriodicCallback

if TYPE_CHECKING:
    from cairn.training.context import Moment, TrainingContext


@register("callback", "repeats", paper=Paper("Scaling Data-Constrained Language Models", "arXiv:2305.16264"))
class RepeatsCallback(PeriodicCallback):
    """Report how often each source has been read (`passes/NAME`); leave it out of the mixture once it has been read `limit` times."""

    limit: float | None = Field(None, gt=0)
    """Passes over a source; about four are nearly as good as new data. None only reports. The last source is never left out."""

    def handler(self, trainer: TrainingContext) -> Handler:
        return _Counter(self, trainer)


class _Counter(Handler):
    def __init__(self, callback: RepeatsCallback, trainer: TrainingContext) -> None:
        self.callback, self.trainer = callback, trainer

    def after_update(self, moment: Moment) -> dict[str, Any] | None:
        due = self.callback.due(moment, self.trainer)
        if self.callback.limit is None and not due:
            return None
        feed, position = self.trainer.feed, self.trainer.progress.position
        read = feed.mixture.cursor(position)
        passes = {name: read[name] / samples for name, samples in feed.epoch_samples.items()}
        self._leave_out(passes, feed.mixture.weights_at(position))
        return {f"passes/{name}": count for name, count in passes.items()} if due else None

    def _leave_out(self, passes: dict[str, float], weights: dict[str, float]) -> None:
        limit = self.callback.limit
        done = {name for name, weight in weights.items() if weight and limit is not None and passes[name] >= limit}
        if done and any(weight and name not in done for name, weight in weights.items()):
            self.trainer.change_mixture({name: 0.0 if name in done else weight for name, weight in weights.items()})
            self.trainer.logger.message(f"{', '.join(sorted(done))}: read {limit:g} times, left out from here on")
