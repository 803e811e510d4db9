"""What a merge is tuned for, and what is reported of it: one measurement on two sets of data that must not be the same.

Whatever chooses coefficients, orders a soup or picks masks has seen its data; a figure on those data is no evidence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating import stream
from cairn.device import choose
from cairn.errors import InputError, suggestion
from cairn.evaluation.measure import Measurement, Score, recipe_behind
from cairn.options import configure
from cairn.training.fields import preprocessor_for

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.order.feed import Feed

Measure = Callable[["nn.Module", Any], Score]
LOWER = ("loss", "bits_per_byte", "perplexity")
"""Metrics of which less is better; of all others more is."""


@dataclass(frozen=True)
class MergeTarget:
    """`select` measures for choosing, `report` (None where nothing is reported) for telling; `described` goes into lineage."""

    select: Measure
    report: Measure | None
    lower: bool
    """Whether less is better."""
    described: dict[str, Any]

    def better(self, a: float, b: float) -> bool:
        """Whether a is better than b."""
        return a < b if self.lower else a > b


def objective(task: str, reference: Checkpoint, *, select: Mapping[str, Any], report: Mapping[str, Any] | None, metric: str | None = None) -> MergeTarget:
    """The objective of a measurement with its options for choosing and for reporting; `metric` defaults to its first.

    Raises `InputError` where both are made on the same data.
    """
    chooser: Measurement = configure(Measurement, {"name": task, **select})
    teller: Measurement | None = configure(Measurement, {"name": task, **report}) if report is not None else None
    feed = _feed(reference) if chooser.needs_feed() or (teller is not None and teller.needs_feed()) else None
    protocols = [item.protocol(feed) for item in (chooser, teller) if item is not None]
    if len(protocols) == 2 and json.dumps(protocols[0], sort_keys=True) == json.dumps(protocols[1], sort_keys=True):
        raise InputError(
            f"{task} would choose and report on the same data, and a figure on data that chose is no evidence; give two sets, "
            "for example select.corpus=valid.txt report.corpus=test.txt."
        )
    name = metric or ("loss" if task == "held-out" else "accuracy")
    described = {"task": task, "metric": name, "select": protocols[0]} | ({"report": protocols[1]} if teller is not None else {})
    return MergeTarget(_measure(chooser, name, feed), _measure(teller, name, feed) if teller is not None else None, name in LOWER, described)


class Bench:
    """Merges candidates in memory, into one model that is used again and again, and measures them; writes nothing."""

    def __init__(self, parents: Sequence[Checkpoint]) -> None:
        self.parents, self._preprocessor = list(parents), preprocessor_for(parents[0])
        self._model = parents[0].model(device=choose())

    def merged(self, operation: stream.Operation, parents: Sequence[Checkpoint] | None = None) -> nn.Module:
        """The model with the operation's result as its weights; the next call overwrites it."""
        stream.results(operation, self.parents if parents is None else parents, self._model.state_dict())
        return self._model

    def score(self, operation: stream.Operation, measure: Measure, parents: Sequence[Checkpoint] | None = None) -> Score:
        """What `measure` says of the operation's result."""
        return measure(self.merged(operation, parents), self._preprocessor)

    def alone(self, checkpoint: Checkpoint, measure: Measure) -> Score:
        """What `measure` says of one checkpoint as it is."""
        import torch

        with torch.no_grad():
            for name, tensor in self._model.state_dict().items():
                if name in checkpoint.tensors:
                    tensor.copy_(checkpoint.tensors[name].load())
        return measure(self._model, self._preprocessor)


def _measure(measurement: Measurement, metric: str, feed: Feed | None) -> Measure:
    def measure(model: nn.Module, preprocessor: Any) -> Score:
        scores = {score.metric: score for score in measurement.of(model, preprocessor, feed)}
        if metric not in scores:
            raise InputError(f"The measurement has no metric '{metric}'.{suggestion(metric, scores)}")
        return scores[metric]

    return measure


def _feed(reference: Checkpoint) -> Feed:
    from cairn.training.recipe import Recipe
    from cairn.training.sources import open_recorded

    recipe = recipe_behind(reference)
    if recipe is None:
        raise InputError(f"{reference.path} does not say on which data it was trained; name texts to measure on: select.corpus=NAME report.corpus=NAME.")
    parsed = Recipe.parse(recipe, "recipe in lineage")
    return open_recorded(parsed.data, parsed.seed, parsed.data.preprocessor_of(reference))[1]
