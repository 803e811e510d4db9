"""Word order: does the model prefer a held-out sentence to the same sentence with two of its words swapped?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from cairn.catalog import Paper, register
from cairn.data.random import seed_for, uniform
from cairn.errors import InputError
from cairn.evaluate.measure import Measurement, Score
from cairn.evaluate.scoring import log_likelihoods
from cairn.evaluate.statistics import binomial_error

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.feed import Feed
    from cairn.data.tokenizer import Tokenizer

_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@register("measurement", "word-swap", paper=Paper("Experience of Training a 1.7B-Parameter LLaMa Model From Scratch", card=1))
class WordSwap(Measurement):
    """Share of held-out sentences that are more probable than themselves with two words swapped."""

    sentences: int = Field(500, ge=1)
    words: tuple[int, int] = (6, 25)
    """Fewest and most words of a sentence that is taken."""
    seed: int = 0

    def needs_feed(self) -> bool:
        return True

    def data_digest(self, feed: Feed | None = None) -> str:
        return ",".join(source.store.digest for source in feed.sources) if feed is not None else ""

    def of(self, model: nn.Module, tokenizer: Tokenizer, feed: Feed | None = None) -> list[Score]:
        if feed is None:
            raise InputError("word-swap is made on the held-out documents of the run; this checkpoint has none.")
        chosen = self._chosen(list(dict.fromkeys(self._sentences(tokenizer, feed))))
        texts = [text for number, sentence in enumerate(chosen) for text in (sentence, self._swapped(sentence, number))]
        begin = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
        scores = log_likelihoods(model, [begin + ids for ids in tokenizer.encode_batch(texts)])
        right, n = int((scores[0::2] > scores[1::2]).sum()), len(chosen)
        return [Score("word-swap", "accuracy", right / n, binomial_error(right, n), n, chance=0.5)]

    def _sentences(self, tokenizer: Tokenizer, feed: Feed) -> Iterator[str]:
        for source in feed.sources:
            split = source.store.held_out
            ends = np.append(split.starts[1:], len(split.tokens))
            for begin, end in zip(split.starts.tolist(), ends.tolist(), strict=True):
                for sentence in _SENTENCE.split(tokenizer.decode(split.tokens[int(begin) + 1 : int(end)].tolist())):
                    words = sentence.split()
                    if self.words[0] <= len(words) <= self.words[1] and len(set(words)) == len(words):
                        yield " ".join(words)

    def _chosen(self, sentences: list[str]) -> list[str]:
        if not sentences:
            raise InputError("The held-out documents contain no sentence of the wanted length; raise data.held_out.")
        order = np.argsort(uniform(seed_for(self.seed, "sentences"), np.arange(len(sentences))), kind="stable")
        return [sentences[i] for i in order[: self.sentences]]

    def _swapped(self, sentence: str, number: int) -> str:
        words: list[Any] = sentence.split()
        first, second = np.argsort(uniform(seed_for(self.seed, "swap", number), np.arange(len(words))))[:2]
        words[first], words[second] = words[second], words[first]
        return " ".join(words)
