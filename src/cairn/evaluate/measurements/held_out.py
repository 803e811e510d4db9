"""Loss on text that was kept out of training.

loss = -(1/N) sum log p(token | before)  [nats per token],   bits per byte = N * loss / (ln 2 * bytes)
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from cairn.catalog import register
from cairn.errors import InputError
from cairn.evaluate.engine import engine_of
from cairn.evaluate.measure import Measurement, Score
from cairn.evaluate.statistics import ratio

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.feed import Feed, Samples
    from cairn.data.tokenizer import Tokenizer


@register("measurement", "held-out")
class HeldOut(Measurement):
    """Loss in nats per token and bits per byte on fixed held-out windows of the run's own data, or of another corpus."""

    sequences: int = Field(256, ge=1)
    """Windows that are scored, always the same ones."""
    corpus: Any = None
    """A corpus to measure instead of the run's held-out documents; all of its documents count as held out."""
    sequence_length: int = Field(256, ge=2)
    """Window for `corpus`; the run's own data keep their own."""
    by_source: bool = False
    """Also score each source of the run's data apart, as `held-out/NAME`; `sequences` are shared among them."""
    batch: int = Field(16, ge=1)
    """Windows of one forward pass; changes nothing but speed."""

    def needs_feed(self) -> bool:
        return self.corpus is None

    def data_digest(self, feed: Feed | None = None) -> str:
        if self.corpus is not None:
            from cairn.data import corpora

            return corpora.resolve(self.corpus).fingerprint()
        return ",".join(source.store.digest for source in feed.sources) if feed is not None else ""

    def protocol(self, feed: Feed | None = None) -> dict[str, Any]:
        described = super().protocol(feed)
        del described["batch"]
        if not self.by_source:
            del described["by_source"]
        if feed is not None and self.corpus is None:
            described["sequence_length"] = feed.sequence_length
        return described

    def of(self, model: nn.Module, tokenizer: Tokenizer, feed: Feed | None = None) -> list[Score]:
        samples = self._samples(tokenizer, feed)
        losses = self._losses(model, samples)
        weights = samples.weights.sum(axis=1)
        text = (tokenizer.token_bytes[samples.tokens[:, 1:]] * samples.weights).sum(axis=1)
        scores = self._scores("held-out", losses, weights, text)
        if self.by_source and feed is not None and self.corpus is None:
            for number, source in enumerate(feed.sources):
                mine = samples.source == number
                scores += self._scores(f"held-out/{source.name}", losses[mine], weights[mine], text[mine]) if mine.any() else []
        return scores

    def _scores(self, task: str, losses: np.ndarray, weights: np.ndarray, text: np.ndarray) -> list[Score]:
        loss, loss_error = ratio(losses, weights)
        bits, bits_error = ratio(losses / math.log(2), text)
        return [Score(task, "loss", loss, loss_error, len(losses)), Score(task, "bits_per_byte", bits, bits_error, len(losses))]

    def _samples(self, tokenizer: Tokenizer, feed: Feed | None) -> Samples:
        if self.corpus is None:
            if feed is None:
                raise InputError("held-out needs the data of the run, or corpus=NAME_OR_PATH.")
            return feed.held_out(self.sequences)
        from cairn.data.feed import Feed, SourceSpec
        from cairn.data.tokens import prepare_cached

        store = prepare_cached(self.corpus, tokenizer, held_out=0.0)
        whole = Feed([SourceSpec("text", store)], self.sequence_length, seed=0)
        return whole.evenly(self.sequences, "train")

    def _losses(self, model: nn.Module, samples: Samples) -> np.ndarray:
        """Summed loss of each window; attention stays inside a document, so each document in a window is a text of its own."""
        pieces = []
        for row, tokens in enumerate(samples.tokens):
            documents = samples.documents[row, :-1] if samples.documents is not None else np.zeros(len(tokens) - 1)
            cuts = [0, *(np.flatnonzero(np.diff(documents)) + 1).tolist(), len(documents)]
            pieces += [(row, begin, end) for begin, end in pairwise(cuts) if samples.weights[row, begin:end].any()]
        texts = [samples.tokens[row, begin : end + 1].tolist() for row, begin, end in pieces]
        engine = engine_of(model, budget_tokens=self.batch * samples.tokens.shape[1])
        sums = np.zeros(len(samples.tokens))
        for (row, begin, end), logs in zip(pieces, engine.token_scores(texts), strict=True):
            sums[row] -= float((logs * samples.weights[row, begin:end]).sum())
        return sums
