"""Measure the model as it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from cairn.catalog import register
from cairn.options import Method
from cairn.training.callbacks import Handler, PeriodicCallback

if TYPE_CHECKING:
    from cairn.training.context import Moment, TrainingContext


@register("callback", "evaluate")
class Evaluate(PeriodicCallback):
    """Take measurements of the model in training; their figures join metrics.jsonl as `task/metric`."""

    measurements: list[Annotated[Any, Method("measurement")]] = ["held-out"]

    def needs(self) -> frozenset[str]:
        return frozenset(measurement.reads for measurement in self.measurements)

    def handler(self, trainer: TrainingContext) -> Handler:
        return _Evaluator(self, trainer)


class _Evaluator(Handler):
    def __init__(self, callback: Evaluate, trainer: TrainingContext) -> None:
        self.callback, self.trainer = callback, trainer

    def begin(self) -> None:
        """What cannot be measured is refused before the first step: a missing file, data without a held-out part."""
        feed = self.trainer.feed
        for measurement in self.callback.measurements:
            if measurement.needs_feed():
                feed.held_out(1)
            measurement.data_digest(feed)

    def observes(self, moment: Moment) -> bool:
        return self.callback.due(moment, self.trainer)

    def observe(self, moment: Moment) -> dict[str, Any] | None:
        figures: dict[str, Any] = {}
        with self.trainer.evaluating() as subject:
            for measurement in self.callback.measurements:
                for score in measurement.of(subject["model"], subject["preprocessor"], subject["feed"]):
                    figures[f"{score.task}/{score.metric}"] = score.value
        return figures
