"""Brackets: does the model close the bracket that is open?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from cairn.catalog import Paper, register
from cairn.evaluation.choices import Item
from cairn.evaluation.held_out_text import HeldOutChoices, drawn

if TYPE_CHECKING:
    from cairn.data.order.feed import Feed
    from cairn.data.text.tokenizer import Tokenizer

PAIRS = {"(": ")", "[": "]", "{": "}"}


def closings(text: str, window: int) -> list[tuple[int, int]]:
    """Places of closing brackets whose partner stands at most `window` characters before: (place of the opening one, place)."""
    found, opened = [], list[tuple[str, int]]()
    for place, sign in enumerate(text):
        if sign in PAIRS:
            opened.append((PAIRS[sign], place))
        elif sign in PAIRS.values():
            if opened and opened[-1][0] == sign:
                begin = opened.pop()[1]
                if place - begin <= window:
                    found.append((begin, place))
            else:
                opened.clear()  # prose closes what it never opened; begin again
    return found


@register("measurement", "brackets", paper=Paper("The Fine Line: Navigating Large Language Model Pretraining with Down-streaming Capability Analysis", card=3))
class Brackets(HeldOutChoices):
    """Share of brackets in the held-out documents that the model closes with their own partner rather than with another kind."""

    places: int = Field(300, ge=1)
    context: int = Field(120, ge=2)
    """Characters before the closing bracket that the model sees; the opening one is among them."""

    def questions(self, tokenizer: Tokenizer, feed: Feed | None = None) -> list[Item]:
        kinds = tuple(PAIRS.values())
        places: dict[str, list[Item]] = {kind: [] for kind in kinds}
        for text in self.documents(tokenizer, feed):
            for begin, place in closings(text, self.context):
                if text[place - 1].strip() and place - begin > 1:
                    places[text[place]].append(Item(text[max(0, place - self.context) : place], kinds, kinds.index(text[place])))
        # Round brackets are most of all brackets: each kind counts the same, or a model that always answers ")" would seem to know.
        each = -(-self.places // len(kinds))
        return [item for kind in kinds if places[kind] for item in drawn(places[kind], each, self.seed, f"'{kind}'")] or drawn([], 1, self.seed, "brackets")
