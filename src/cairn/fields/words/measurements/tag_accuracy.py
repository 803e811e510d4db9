"""Accuracy of a tagger on sentences that were kept out of training.

accuracy = right / n over the n words that have a tag, with Wilson's interval;   loss = -(1/n) sum log p(tag)   [nats per word]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cairn.catalog import register
from cairn.errors import InputError
from cairn.evaluation.measure import Measurement, Score
from cairn.fields.words.sentence_sets import UNTAGGED
from cairn.options import Method
from cairn.statistics import binomial_error, mean_error

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.order.feed import Feed


@register("measurement", "tag-accuracy")
class TagAccuracy(Measurement):
    """Share of words whose tag a model tells right, and its loss on them."""

    reads: ClassVar[str] = "words"

    one_at_a_time: ClassVar[Mapping[str, Any]] = {"batch": 1}

    samples: int = Field(10_000, ge=1)
    """Sentences that are tagged, always the same ones; all of the split where it has fewer."""
    split: Literal["held_out", "train"] = "held_out"
    """The part of the data: what was kept out of training, or what is trained on."""
    data: Annotated[Any, Method("field", optional=True)] = None
    """Other data than the run's own: a mapping with the name of a field and its options; with `held_out: 0` and `split: train` all of them."""
    by_source: bool = False
    """Also each source of the data apart, as `tag-accuracy/NAME`."""
    batch: int = Field(64, ge=1)
    """Sentences of one forward pass; changes nothing but speed."""

    def needs_feed(self) -> bool:
        return self.data is None

    def data_digest(self, feed: Feed | None = None) -> str:
        return ",".join(feed.digests().values()) if feed is not None else ""

    def protocol(self, feed: Feed | None = None) -> dict[str, Any]:
        described = super().protocol(feed)
        del described["batch"]
        if self.data is not None:
            described["sources"] = self.data.open(0)[1].digests()
        return described

    def of(self, model: nn.Module, preprocessor: Any, feed: Feed | None = None) -> list[Score]:
        architecture: Any = getattr(model, "architecture", None)
        if not hasattr(architecture, "classes"):
            raise InputError(f"A '{getattr(architecture, 'model_type', type(model).__name__)}' has no tags, so it has no accuracy.")
        if self.data is not None:
            feed = self.data.open(0, preprocessor)[1]
        if feed is None:
            raise InputError("tag-accuracy needs the data of the run, or data={name: words, sources: {...}}.")
        samples = feed.evenly(self.samples, self.split)
        logs, right, source = self._answers(model, feed, samples)
        if not len(right):
            raise InputError("No word of these sentences has a tag, so there is nothing to measure.")
        classes = len(preprocessor.classes) or None
        scores = _scores("tag-accuracy", logs, right, classes)
        if self.by_source:
            for number, each in enumerate(feed.sources):
                mine = source == number
                scores += _scores(f"tag-accuracy/{each.name}", logs[mine], right[mine], classes) if mine.any() else []
        return scores

    def _answers(self, model: nn.Module, feed: Any, samples: Any) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]:
        """Of each word that has a tag: the log-probability of that, whether it is the most probable one, and the number of its source. A word of
        which a logit is not a number has neither: NaN, and wrong. Sentences of like length share a pass, which pads little."""
        import torch

        device, found = next(model.parameters()).device, []
        order = np.argsort(samples.inputs["lengths"], kind="stable")
        with torch.no_grad():
            for first in range(0, len(order), self.batch):
                part = order[first : first + self.batch]
                some = feed.gathered(samples.source[part], samples.index[part], samples.keys[part])
                inputs = {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in some.inputs.items()}
                logits, tags = model(**inputs).double().cpu(), torch.from_numpy(some.tags)
                there = tags != UNTAGGED
                asked, wanted = logits[there], tags[there]
                finite = asked.isfinite().all(1)
                chances = torch.where(finite, asked.log_softmax(1).gather(1, wanted[:, None])[:, 0], torch.nan)
                sources = np.broadcast_to(some.source[:, None], some.tags.shape)[there.numpy()]
                found.append((chances.numpy(), ((asked.argmax(1) == wanted) & finite).numpy(), sources))
        logs, right, sources = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return logs, right, sources


def _scores(task: str, logs: NDArray[np.float64], right: NDArray[np.bool_], classes: int | None) -> list[Score]:
    """Where one answer is not a number, none of the figures is: a share of the rest would be of another set of words."""
    count = len(right)
    if not np.isfinite(logs).all():
        return [Score(task, metric, math.nan, math.nan, count) for metric in ("accuracy", "loss")]
    correct = int(right.sum())
    return [
        Score(task, "accuracy", correct / count, binomial_error(correct, count), count, 1 / classes if classes else None),
        Score(task, "loss", float(-logs.mean()), mean_error(logs), count, math.log(classes) if classes else None),
    ]
