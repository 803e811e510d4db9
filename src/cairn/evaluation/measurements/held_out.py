"""Loss on text that was kept out of training.

loss = -(1/N) sum log p(token | before)  [nats per token],   bits per byte = N * loss / (ln 2 * bytes)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cairn import catalog
from cairn.catalog import register
from cairn.errors import InputError
from cairn.evaluation.engine import engine_of
from cairn.evaluation.held_out_text import HeldOutText, windows_of
from cairn.evaluation.measure import Score
from cairn.statistics import ratio

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.order.feed import Feed
    from cairn.data.text.feed import Samples
    from cairn.data.text.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class HeldOutWindows:
    """What a model says of the tokens of n windows of L, each given those before it, all (n, L): the `tokens`, their `weights` and the `bytes` behind each,
    `logs` (log-probabilities; 0 where nothing was asked) and `right`, whether each was the most probable one; `source` (n,): where each window comes from."""

    tokens: NDArray[np.int64]
    weights: NDArray[np.float32]
    bytes: NDArray[np.int64]
    source: NDArray[np.int64]
    logs: NDArray[np.float64]
    right: NDArray[np.bool_]

    def chosen(self, which: NDArray[np.bool_]) -> HeldOutWindows:
        """Some of the windows."""
        return HeldOutWindows(*(getattr(self, each.name)[which] for each in fields(self)))


@register("measurement", "held-out")
class HeldOut(HeldOutText):
    """Loss in nats per token and bits per byte on fixed held-out windows of the run's own data, or of another corpus."""

    sequences: int = Field(256, ge=1)
    """Windows that are scored, always the same ones."""
    sequence_length: int = Field(256, ge=2)
    """Window for `corpus`; the run's own data keep their own."""
    by_source: bool = False
    """Also score each source of the run's data apart, as `held-out/NAME`; `sequences` are shared among them."""
    batch: int = Field(16, ge=1)
    """Windows of one forward pass; changes nothing but speed."""

    def protocol(self, feed: Feed | None = None) -> dict[str, Any]:
        described = super().protocol(feed)
        del described["batch"]
        if not self.by_source:
            del described["by_source"]
        if feed is not None and self.corpus is None:
            described["sequence_length"] = feed.sample_units
        return described

    def of(self, model: nn.Module, tokenizer: Tokenizer, feed: Feed | None = None) -> list[Score]:
        name, seen = catalog.name_of(self) or type(self).__name__, self.windows(model, tokenizer, feed)
        scores = self.scores(name, seen)
        if self.by_source and feed is not None and self.corpus is None:
            for number, source in enumerate(feed.sources):
                mine = seen.source == number
                scores += self.scores(f"{name}/{source.name}", seen.chosen(mine)) if mine.any() else []
        return scores

    def windows(self, model: nn.Module, tokenizer: Tokenizer, feed: Feed | None = None) -> HeldOutWindows:
        """What the model says of each token of the windows."""
        samples = self._samples(tokenizer, feed)
        logs, right = self._answers(model, samples, tokenizer)
        targets = samples.tokens[:, 1:]
        return HeldOutWindows(targets, samples.weights, tokenizer.bytes_of(samples.tokens), samples.source, logs, right)

    def scores(self, task: str, seen: HeldOutWindows) -> list[Score]:
        """The figures of some windows."""
        losses, n = -(seen.logs * seen.weights).sum(axis=1), len(seen.logs)
        loss, loss_error = ratio(losses, seen.weights.sum(axis=1))
        bits, bits_error = ratio(losses / math.log(2), (seen.bytes * seen.weights).sum(axis=1))
        return [Score(task, "loss", loss, loss_error, n), Score(task, "bits_per_byte", bits, bits_error, n)]

    def _samples(self, tokenizer: Tokenizer, feed: Feed | None) -> Samples:
        if self.corpus is None:
            if feed is None:
                raise InputError("held-out needs the data of the run, or corpus=NAME_OR_PATH.")
            return feed.held_out(self.sequences)
        return windows_of(self.corpus, tokenizer, self.sequences, self.sequence_length)

    def _answers(self, model: nn.Module, samples: Samples, tokenizer: Tokenizer) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Log-probability of each token and whether it is the most probable one; attention stays inside a document, so each document in a
        window is a text of its own."""
        pieces = []
        for row, tokens in enumerate(samples.tokens):
            documents = samples.documents[row, :-1] if samples.documents is not None else np.zeros(len(tokens) - 1)
            cuts = [0, *(np.flatnonzero(np.diff(documents)) + 1).tolist(), len(documents)]
            pieces += [(row, begin, end) for begin, end in pairwise(cuts) if samples.weights[row, begin:end].any()]
        texts = [samples.tokens[row, begin : end + 1].tolist() for row, begin, end in pieces]
        front = tokenizer.prompt("")
        # Stores part documents by the end of a text; a document that begins a text has in front what the tokenizer puts there.
        begun = [text[0] == tokenizer.eos_id and bool(front) for text in texts]
        texts = [[*front, *text[1:]] if new else text for text, new in zip(texts, begun, strict=True)]
        starts = [len(front) if new else 1 for new in begun]
        engine = engine_of(model, budget_tokens=self.batch * samples.tokens.shape[1])
        logs, right = np.zeros(samples.weights.shape), np.zeros(samples.weights.shape, bool)
        for (row, begin, end), answer in zip(pieces, engine.token_answers(texts, starts), strict=True):
            logs[row, begin:end], right[row, begin:end] = answer
        return logs, right
