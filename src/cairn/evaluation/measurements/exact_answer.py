"""Text to text: does greedy decoding write exactly the right answer?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import model_validator

from cairn.catalog import register
from cairn.evaluation.answers import proportion
from cairn.evaluation.items import ItemMeasurement, Seen, encoded_from, greedy_matches
from cairn.evaluation.measure import Score

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.text.tokenizer import Tokenizer


@register("measurement", "exact-answer")
class ExactAnswer(ItemMeasurement):
    """Share of inputs whose right output, to its end, is what greedy decoding writes."""

    template: str = "{input}\n"
    """What the model reads; its output follows at once."""
    end: str = "\n"
    """What must follow the output: without an end, the beginning of a longer answer would count."""
    input: str = "input"
    output: str = "output"

    @model_validator(mode="after")
    def _reads_the_input(self) -> Self:
        if "{input}" not in self.template or not self.end:
            raise ValueError("template must hold {input}, and end must not be empty.")
        return self

    def look(self, model: nn.Module, tokenizer: Tokenizer) -> Seen:
        """Whether each item is `right`."""
        rows = self.rows(self.input, self.output)
        sequences, starts = encoded_from(tokenizer, [(self.template.replace("{input}", str(row[self.input])), f"{row[self.output]}{self.end}") for row in rows])
        return {"right": greedy_matches(model, sequences, starts)}

    def scores(self, seen: Seen) -> list[Score]:
        return [proportion("exact-answer", "accuracy", seen["right"], chance=0.0)]
