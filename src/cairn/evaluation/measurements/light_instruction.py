"""Open questions for base models: a short instruction and solved examples in exactly the form in which the answer is read.

Prompt = instruction, n times (input, output in the target form, separator), the input. The output is read by the same pattern
that the examples obey, and how often it can be read at all (compliance) is reported beside how often it is right.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from pydantic import Field, model_validator

from cairn.catalog import Paper, register
from cairn.errors import InputError
from cairn.evaluation.answers import proportion
from cairn.evaluation.engine import engine_of
from cairn.evaluation.items import ItemMeasurement, Seen
from cairn.evaluation.measure import Score
from cairn.randomness import seed_for, uniform

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.text.tokenizer import Tokenizer

_BATCH = 64


def read_answer(text: str, answer: str, separator: str) -> str | None:
    """The answer in what a model wrote: up to the separator, in the form `answer` around its blank; None where it has another form."""
    if separator not in text:
        return None
    before, _, after = answer.partition("___")
    found = re.fullmatch(f"{re.escape(before.strip())}\\s*(.+?)\\s*{re.escape(after.strip())}", text.partition(separator)[0].strip(), re.DOTALL)
    return found[1] if found else None


@register("measurement", "light-instruction", paper=Paper("Toward Stable and Consistent Evaluation Results (BOSE)", "arXiv:2503.00812", card=29))
class LightInstruction(ItemMeasurement):
    """Share of open questions answered right behind a light instruction and solved examples, and share answered in the asked form."""

    instruction: str = "Answer each question and end with 'The answer is ...'."
    """One short sentence that names task and form of the answer; empty: none."""
    answer: str = "The answer is ___."
    """The form of an answer, in the examples and in what is read."""
    shots: int = Field(5, ge=1)
    """Solved examples, drawn once from the file and not scored: the same for every checkpoint."""
    input: str = "input"
    output: str = "output"
    separator: str = "\n\n"
    """Stands between examples and ends an answer."""
    new_tokens: int = Field(48, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _has_a_form(self) -> Self:
        if "___" not in self.answer or not self.separator:
            raise ValueError("answer must hold the blank ___, and separator must not be empty.")
        return self

    def look(self, model: nn.Module, tokenizer: Tokenizer) -> Seen:
        """For each item the `text` that was written, what is `said` in it (None where it cannot be read), the `answer`, whether that is `right`."""
        from cairn.generation import limits
        from cairn.generation.sample import generate

        shown, asked = self._split(self.rows(self.input, self.output))
        head = "".join(f"{part}{self.separator}" for part in (self.instruction, *map(self._solved, shown)) if part)
        prompts = [tokenizer.prompt(f"{head}{row[self.input]}\n") for row in asked]
        ends = limits.end_ids(model, tokenizer)
        size = min(_BATCH, max(1, engine_of(model, tokenizer).budget // (max(map(len, prompts)) + self.new_tokens)))
        texts: list[str] = []
        for first in range(0, len(prompts), size):
            part = prompts[first : first + size]
            written = generate(model, part, max_new_tokens=self.new_tokens, temperature=0, end_ids=ends)
            # A document that ends is an answer that ends.
            texts += [
                tokenizer.continuation(prompt, ids) + (self.separator if len(ids) < self.new_tokens else "") for prompt, ids in zip(part, written, strict=True)
            ]
        said = [read_answer(text, self.answer, self.separator) for text in texts]
        answers = [str(row[self.output]).strip() for row in asked]
        return {"text": texts, "said": said, "answer": answers, "right": [a == b for a, b in zip(said, answers, strict=True)]}

    def scores(self, seen: Seen) -> list[Score]:
        readable = [said is not None for said in seen["said"]]
        return [
            proportion("light-instruction", "accuracy", seen["right"], chance=0.0),
            proportion("light-instruction", "compliance", readable),
        ]

    def _solved(self, row: dict[str, Any]) -> str:
        return f"{row[self.input]}\n{self.answer.replace('___', str(row[self.output]))}"

    def _split(self, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        if len(rows) <= self.shots:
            raise InputError(f"{self.path} holds {len(rows)} items, {self.shots} of which are shown solved; none is left to score.")
        chosen = set(np.argsort(uniform(seed_for(self.seed, "shots"), np.arange(len(rows))), kind="stable")[: self.shots].tolist())
        return [rows[i] for i in sorted(chosen)], [row for i, row in enumerate(rows) if i not in chosen]
