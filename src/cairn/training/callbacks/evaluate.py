"""Measure the model as it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from cairn.catalog import register
from cairn.options import Method
from cairn.training.callbacks import Handler, Moment, PeriodicEvent

if TYPE_CHECKING:
    from cairn.training.loop import Trainer


@register("event", "evaluate")
class Evaluate(PeriodicEvent):
    """Take measurements of the model in training; their figures join metrics.jsonl as `task/metric`."""

    measurements: list[Annotated[Any, Method("measurement")]] = ["held-out"]

    def handler(self, trainer: Trainer) -> Handler:
        return _Evaluator(self, trainer)


class _Evaluator(Handler):
    def __init__(self, event: Evaluate, trainer: Trainer) -> None:
        self.event, self.trainer = event, trainer

    def after_update(self, moment: Moment) -> dict[str, Any] | None:
        if not self.event.due(moment, self.trainer):
            return None
        figures: dict[str, Any] = {}
        with self.trainer.evaluating() as subject:
            for measurement in self.event.measurements:
                for score in measurement.of(**subject):
                    figures[f"{score.task}/{score.metric}"] = score.value
        return figures
