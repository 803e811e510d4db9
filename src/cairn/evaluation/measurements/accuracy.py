"""Accuracy of a classifier on labelled samples that were kept out of training.

accuracy = right / n, with Wilson's interval;   loss = -(1/n) sum log p(label)   [nats per sample]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cairn.catalog import register
from cairn.errors import InputError
from cairn.evaluation.measure import Measurement, Score
from cairn.options import Method
from cairn.statistics import binomial_error, mean_error

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.order.feed import Feed


@register("measurement", "accuracy")
class Accuracy(Measurement):
    """Share of labelled samples that a classifier tells right, and its loss on them."""

    reads: ClassVar[str] = "images"

    one_at_a_time: ClassVar[Mapping[str, Any]] = {"batch": 1}

    samples: int = Field(10_000, ge=1)
    """Samples that are classified, always the same ones; all of the split where it has fewer."""
    split: Literal["held_out", "train"] = "held_out"
    """The part of the data: what was kept out of training, or what is trained on."""
    data: Annotated[Any, Method("field", optional=True)] = None
    """Other data than the run's own: a mapping with the name of a field and its options; with `held_out: 0` and `split: train` all of them."""
    by_source: bool = False
    """Also each source of the data apart, as `accuracy/NAME`."""
    batch: int = Field(256, ge=1)
    """Samples of one forward pass; changes nothing but speed."""

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
        architecture = getattr(model, "architecture", None)
        if architecture is not None and not hasattr(architecture, "classes"):
            raise InputError(f"A '{architecture.model_type}' has no classes, so it has no accuracy.")
        if self.data is not None:
            feed = self.data.open(0, preprocessor)[1]
        if feed is None:
            raise InputError("accuracy needs the data of the run, or data={name: images, sources: {...}}.")
        samples = feed.evenly(self.samples, self.split)
        logs, right = self._answers(model, samples)
        classes = len(getattr(preprocessor, "classes", ())) or None
        scores = _scores("accuracy", logs, right, classes)
        if self.by_source:
            for number, source in enumerate(feed.sources):
                mine = samples.source == number
                scores += _scores(f"accuracy/{source.name}", logs[mine], right[mine], classes) if mine.any() else []
        return scores

    def _answers(self, model: nn.Module, samples: Any) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Log-probability of the label of each sample, and whether it is the most probable class. A sample of which a logit is not a number
        has neither: NaN, and wrong."""
        import torch

        device, logs, right = next(model.parameters()).device, [], []
        dtype = next(model.parameters()).dtype
        with torch.no_grad():
            for part in _parts(len(samples.labels), self.batch):
                inputs = {name: torch.from_numpy(np.ascontiguousarray(array[part])).to(device, dtype) for name, array in samples.inputs.items()}
                found = model(**inputs)
                logits = (found if isinstance(found, torch.Tensor) else found.logits).double()
                labels = torch.from_numpy(samples.labels[part]).to(device)
                if int(labels.max()) >= logits.shape[1]:
                    raise InputError(f"A label is {int(labels.max())}, and the model has {logits.shape[1]} classes.")
                chances = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
                finite = logits.isfinite().all(1)
                logs.append(torch.where(finite, chances, torch.nan).cpu().numpy())
                right.append(((logits.argmax(1) == labels) & finite).cpu().numpy())
        return np.concatenate(logs), np.concatenate(right)


def _parts(count: int, size: int) -> Iterator[slice]:
    yield from (slice(first, min(first + size, count)) for first in range(0, count, size))


def _scores(task: str, logs: NDArray[np.float64], right: NDArray[np.bool_], classes: int | None) -> list[Score]:
    """Where one answer is not a number, none of the figures is: a share of the rest would be of another set of samples."""
    count = len(right)
    if not np.isfinite(logs).all():
        return [Score(task, metric, math.nan, math.nan, count) for metric in ("accuracy", "loss")]
    correct = int(right.sum())
    return [
        Score(task, "accuracy", correct / count, binomial_error(correct, count), count, 1 / classes if classes else None),
        Score(task, "loss", float(-logs.mean()), mean_error(logs), count, math.log(classes) if classes else None),
    ]
