"""Word order: does the model prefer a held-out sentence to the same sentence with two of its words swapped?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from cairn.catalog import Paper, register
from cairn.evaluation.answers import greater, proportion
from cairn.evaluation.engine import engine_of
from cairn.evaluation.held_out_text import HeldOutText, drawn
from cairn.evaluation.measure import Score
from cairn.randomness import seed_for, uniform

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.order.feed import Feed
    from cairn.data.text.tokenizer import Tokenizer

_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@register("measurement", "word-swap", paper=Paper("Experience of Training a 1.7B-Parameter LLaMa Model From Scratch", card=1))
class WordSwap(HeldOutText):
    """Share of held-out sentences that are more probable than themselves with two words swapped."""

    sentences: int = Field(500, ge=1)
    words: tuple[int, int] = (6, 25)
    """Fewest and most words of a sentence that is taken."""
    seed: int = 0

    def of(self, model: nn.Module, tokenizer: Tokenizer, feed: Feed | None = None) -> list[Score]:
        fitting = list(dict.fromkeys(self._sentences(tokenizer, feed)))
        chosen = drawn(fitting, self.sentences, self.seed, "sentences")
        texts = [text for number, sentence in enumerate(chosen) for text in (sentence, self._swapped(sentence, number))]
        scores = [scored.logprob for scored in engine_of(model, tokenizer).rolling(texts)]
        right = [greater(plain, swapped) for plain, swapped in zip(scores[0::2], scores[1::2], strict=True)]
        return [proportion("word-swap", "accuracy", right, chance=0.5)]

    def _sentences(self, tokenizer: Tokenizer, feed: Feed | None) -> Iterator[str]:
        for text in self.documents(tokenizer, feed):
            for sentence in _SENTENCE.split(text):
                words = sentence.split()
                if self.words[0] <= len(words) <= self.words[1] and len(set(words)) == len(words):
                    yield " ".join(words)

    def _swapped(self, sentence: str, number: int) -> str:
        words: list[Any] = sentence.split()
        first, second = np.argsort(uniform(seed_for(self.seed, "swap", number), np.arange(len(words))))[:2]
        words[first], words[second] = words[second], words[first]
        return " ".join(words)
