"""Known names: which of several real names stands here, the module after `import` or the speaker of the next lines of a play?

A pattern finds names in the held-out documents. The answer is the name that stands there with the sign behind it; the others are names that the same
pattern finds elsewhere, with the same sign, as nearly of the same length as there are: otherwise a model that prefers short texts would seem to know them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, field_validator

from cairn.catalog import Paper, register
from cairn.errors import InputError
from cairn.evaluation.choices import Item
from cairn.evaluation.held_out_text import HeldOutChoices, drawn
from cairn.randomness import seed_for, uniform

if TYPE_CHECKING:
    from cairn.data.order.feed import Feed
    from cairn.data.text.tokenizer import Tokenizer

PATTERNS = {"import": r"^[ \t]*(?:from [\w.]+ )?import (\w+)", "speaker": r"(?<=\n\n)([A-Z][A-Za-z ]+):$"}


@register("measurement", "known-names", paper=Paper("Efficient Continual Pre-training by Mitigating the Stability Gap", "arXiv:2406.14833", card=20))
class KnownNames(HeldOutChoices):
    """Share of places in the held-out documents where the name that stands there is more probable than names that stand elsewhere."""

    names: str = "import"
    """What a name is: `import` (of Python), `speaker` (of a play), or a regular expression whose one group is the name (`^` begins a line)."""
    source: str | None = None
    """Only the documents of this source of the run; default: all."""
    places: int = Field(400, ge=1)
    choices: int = Field(4, ge=2)
    """Names to choose among."""
    context: int = Field(32, ge=1)
    """Characters before the name that the model sees."""

    @field_validator("names")
    @classmethod
    def _pattern(cls, value: str) -> str:
        try:
            groups = re.compile(PATTERNS.get(value, value)).groups
        except re.error as error:
            raise ValueError(f"'{value}' is neither one of {', '.join(PATTERNS)} nor a regular expression: {error}.") from None
        if groups != 1:
            raise ValueError(f"'{value}' has {groups} groups; a regular expression of names has one, the name.")
        return value

    def title(self) -> str:
        return f"{super().title()}/{self.names}"

    def questions(self, tokenizer: Tokenizer, feed: Feed | None = None) -> list[Item]:
        found = self._places(tokenizer, feed)
        names = sorted({name for _, name, _ in found})
        if len(names) < self.choices:
            raise InputError(
                f"The held-out documents contain {len(names)} different names to choose among; {self.choices} are needed. Name a text: corpus=PATH."
            )
        chosen = drawn(found, self.places, self.seed, "name")
        return [self._item(number, *place, names) for number, place in enumerate(chosen)]

    def _places(self, tokenizer: Tokenizer, feed: Feed | None) -> list[tuple[str, str, str]]:
        """What stands before each name, the name, and the sign behind it."""
        pattern, places = re.compile(PATTERNS.get(self.names, self.names), re.MULTILINE), []
        for text in self.documents(tokenizer, feed, self.source):
            for found in pattern.finditer(text):
                begin, end = found.span(1)
                places.append((text[max(0, begin - self.context) : begin], found[1], text[end : end + 1]))
        return [place for place in places if place[0].strip() and place[1]]

    def _item(self, number: int, before: str, name: str, sign: str, names: list[str]) -> Item:
        draws = uniform(seed_for(self.seed, "name", number), np.arange(len(names) + 1))
        nearest = sorted(range(len(names)), key=lambda i: (abs(len(names[i]) - len(name)), draws[i + 1]))
        others = [names[i] for i in nearest[: self.choices] if names[i] != name][: self.choices - 1]
        right = int(draws[0] * self.choices)
        return Item(before, tuple(each + sign for each in (*others[:right], name, *others[right:])), right)
