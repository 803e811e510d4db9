"""Next line: does the model prefer the line that follows to lines from elsewhere?"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from cairn.catalog import Paper, register
from cairn.evaluation.choices import Item
from cairn.evaluation.held_out_text import HeldOutChoices, drawn
from cairn.randomness import seed_for, uniform

if TYPE_CHECKING:
    from cairn.data.order.feed import Feed
    from cairn.data.text.tokenizer import Tokenizer


@register("measurement", "next-line", paper=Paper("The Fine Line: Navigating Large Language Model Pretraining with Down-streaming Capability Analysis", card=3))
class NextLine(HeldOutChoices):
    """Share of places in the held-out documents where the line that follows is more probable than lines from other places."""

    places: int = Field(200, ge=1)
    choices: int = Field(4, ge=2)
    """Lines to choose among."""
    context: int = Field(200, ge=1)
    """Characters before the line that the model sees."""
    shortest: int = Field(12, ge=1)
    """Fewest characters of a line that is taken."""

    def questions(self, tokenizer: Tokenizer, feed: Feed | None = None) -> list[Item]:
        found = drawn(list(self._places(tokenizer, feed)), self.places, self.seed, "pair of lines")
        lines = list(dict.fromkeys(line for _, line in found))
        return [self._item(number, before, line, lines) for number, (before, line) in enumerate(found)]

    def _places(self, tokenizer: Tokenizer, feed: Feed | None) -> list[tuple[str, str]]:
        places = []
        for text in self.documents(tokenizer, feed):
            end = 0
            for line, following in pairwise(text.splitlines(keepends=True)):
                end += len(line)
                if len(following.strip()) >= self.shortest:
                    places.append((text[max(0, end - self.context) : end].rstrip("\n"), "\n" + following.rstrip("\n")))
        return places

    def _item(self, number: int, before: str, line: str, lines: list[str]) -> Item:
        draws = uniform(seed_for(self.seed, "line", number), np.arange(len(lines) + 1))
        others = [lines[i] for i in np.argsort(draws[1:], kind="stable") if lines[i] != line][: self.choices - 1]
        right = int(draws[0] * (len(others) + 1))
        return Item(before, (*others[:right], line, *others[right:]), right)
