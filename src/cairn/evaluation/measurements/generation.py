"""Answers that the model writes itself: the share that is right to the letter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from cairn.catalog import register
from cairn.errors import InputError
from cairn.evaluation.answers import proportion
from cairn.evaluation.engine import engine_of
from cairn.evaluation.measure import Measurement, Score
from cairn.evaluation.rows import digest_of, filled, read_rows

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.order.feed import Feed
    from cairn.data.text.tokenizer import Tokenizer


@register("measurement", "generation")
class GenerationTask(Measurement):
    """Share of items of a file whose greedy answer equals the right one, white space at its ends aside."""

    path: Path
    """JSON lines, one item each."""
    context: str = "prompt"
    """Key of the prompt, or a template such as `Question: {question}\\nAnswer:`."""
    answer: str = "answer"
    """Key of the right answer, or a template."""
    extract: str | None = None
    """Regular expression; its last match (its first group, if it has one) in answer and text is compared instead of the whole."""
    stop: list[str] = ["\n"]
    """Texts that end an answer."""
    new_tokens: int = Field(64, ge=1)
    """Tokens of an answer at most."""
    items: int | None = Field(None, ge=1)
    """How many, the first ones; default: all."""
    task: str | None = None
    """Name of the task in the table; default: `generation`."""

    @field_validator("extract")
    @classmethod
    def _is_expression(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"'{value}' is not a regular expression: {error}.") from None
        return value

    def data_digest(self, feed: Feed | None = None) -> str:
        return digest_of(self.path)

    def protocol(self, feed: Feed | None = None) -> dict[str, Any]:
        described = super().protocol(feed)
        del described["path"]
        return described

    def of(self, model: nn.Module, tokenizer: Tokenizer, feed: Feed | None = None) -> list[Score]:
        rows = read_rows(self.path, self.items)
        prompts = [filled(self.context, row, where) for where, row in rows]
        answers = [self._answer(filled(self.answer, row, where), where) for where, row in rows]
        texts = engine_of(model, tokenizer).generate(prompts, max_new_tokens=self.new_tokens, stop=self.stop)
        right = [self._asked(text) == answer for text, answer in zip(texts, answers, strict=True)]
        return [proportion(self.task or "generation", "exact_match", right, chance=0.0)]

    def _asked(self, text: str) -> str | None:
        """What is compared of a text; None where the expression finds nothing in it, which equals no answer."""
        if self.extract is None:
            return text.strip()
        found = list(re.finditer(self.extract, text))
        return (found[-1][1 if found[-1].re.groups else 0] or "").strip() or None if found else None

    def _answer(self, text: str, where: str) -> str:
        found = self._asked(text)
        if found is None:
            raise InputError(f"{where}: extract='{self.extract}' finds nothing in the right answer {text!r}, so no text could be right; change one of them.")
        return found
