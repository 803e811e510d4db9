"""Cloze: does the model itself write the last word of a held-out sentence?"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from pydantic import Field

from cairn.catalog import Paper, register
from cairn.evaluation.answers import proportion
from cairn.evaluation.engine import engine_of
from cairn.evaluation.held_out_text import HeldOutText, drawn
from cairn.evaluation.measure import Score
from cairn.statistics import mean_error

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.order.feed import Feed
    from cairn.data.text.tokenizer import Tokenizer

_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@register("measurement", "cloze", paper=Paper("The LAMBADA dataset: Word prediction requiring a broad discourse context", "arXiv:1606.06031"))
class Cloze(HeldOutText):
    """Share of held-out sentences whose last word is the model's greedy continuation, and the word's mean log-probability."""

    sentences: int = Field(300, ge=1)
    words: tuple[int, int] = (6, 40)
    """Fewest and most words of a sentence that is taken."""
    seed: int = 0
    """Decides which sentences."""

    def of(self, model: nn.Module, tokenizer: Tokenizer, feed: Feed | None = None) -> list[Score]:
        texts = [" ".join(s.split()) for text in self.documents(tokenizer, feed) for s in _SENTENCE.split(text)]
        fitting = [text for text in dict.fromkeys(texts) if self.words[0] <= len(text.split()) <= self.words[1]]
        pairs = []
        for sentence in drawn(fitting, self.sentences, self.seed, "sentence of the wanted length"):
            before, _, last = sentence.rpartition(" ")
            pairs.append((before, f" {last.rstrip('.!?')}" if last.rstrip(".!?") else f" {last}"))
        found = engine_of(model, tokenizer).loglikelihood(pairs)
        logs, n = [scored.logprob for scored in found], len(found)
        right = [None if math.isnan(scored.logprob) else scored.greedy for scored in found]
        return [
            proportion("cloze", "accuracy", right, chance=0.0),
            Score("cloze", "log_likelihood", sum(logs) / n, mean_error(logs), n),
        ]
