"""Multiple choice for base models: fill the blank with each option and ask which text the model finds most probable.

s_i = -(1 / |span|) sum over the span of log p(x_t | x_<t),   span: the filled option and what follows it.

Beside it the two usual ways: listing the options and asking for a letter, which an early model cannot do, and scoring the
whole text. The option's text decides in `blank` and `content`, so the order of the options cannot.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from cairn.catalog import Paper, register
from cairn.errors import InputError
from cairn.evaluation.answers import proportion
from cairn.evaluation.items import ItemMeasurement, Seen, encoded_from
from cairn.evaluation.measure import Score
from cairn.evaluation.scoring import log_likelihoods
from cairn.statistics import first_largest

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.text.tokenizer import Tokenizer

BLANK = "___"


def filled(question: str, option: str, template: str) -> tuple[str, str]:
    """The text before the blank and the rest, the blank filled; a question with a blank of its own is its own template.

    A space before the blank goes with the option: tokenizers join it to the word.
    """
    text = question if BLANK in question else template.replace("{question}", question)
    before, _, after = text.partition(BLANK)
    bare = before.rstrip(" ")
    return bare, f"{before[len(bare) :]}{option}{after}"


@register("measurement", "choice", paper=Paper("Toward Stable and Consistent Evaluation Results (BOSE)", "arXiv:2503.00812", card=29))
class ChoiceTask(ItemMeasurement):
    """Share of questions answered right when the blank is filled with each option (`ask=blank`), or a letter is asked for."""

    ask: Literal["blank", "content", "letter"] = "blank"
    """`blank`: fill the blank, score from there on; `content`: score the whole text; `letter`: list the options, score their letters."""
    normaliser: Literal["byte", "token", "none", "unconditional"] = "byte"
    """What a score is divided by; `unconditional` subtracts the option's own log-probability, behind the line of the blank alone.
    Letters are never normalised."""
    list_options: bool = False
    """Also list the options before the blank."""
    template: str = "Question: {question}\nAnswer: ___"
    """How a question without a blank is written."""
    shots: int = Field(0, ge=0)
    """Items of the file, the first ones, that are shown solved before each question and are not scored."""
    question: str = "question"
    options: str = "options"
    """Key of the list of options."""
    answer: str = "answer"
    """Key of the number of the right one, from 0."""

    @model_validator(mode="after")
    def _has_a_blank(self) -> Self:
        if BLANK not in self.template or "{question}" not in self.template:
            raise ValueError(f"template must hold {{question}} and the blank {BLANK}.")
        return self

    def look(self, model: nn.Module, tokenizer: Tokenizer) -> Seen:
        """For each item the options' `scores`, the higher the better, what is `said` (an option's number) and whether it is `right`."""
        rows = self._rows()
        texts = [text for row in rows[self.shots :] for text in self._ways(row, rows[: self.shots])]
        sums = self._sums(model, tokenizer, texts)
        ends = np.cumsum([len(options) for _, options, _ in rows[self.shots :]])[:-1]
        scores = np.split(sums, ends)
        said = [first_largest(part) for part in scores]  # ties go to the lowest
        right = [None if choice is None else choice == answer for choice, (_, _, answer) in zip(said, rows[self.shots :], strict=True)]
        return {"scores": [[value if math.isfinite(value) else None for value in part.tolist()] for part in scores], "said": said, "right": right}

    def scores(self, seen: Seen) -> list[Score]:
        chance = float(np.mean([1 / len(part) for part in seen["scores"]]))
        tied = [None if said is None else _tied(part) for said, part in zip(seen["said"], seen["scores"], strict=True)]
        return [proportion("choice", "accuracy", seen["right"], chance), proportion("choice", "ties", tied)]

    def _sums(self, model: nn.Module, tokenizer: Tokenizer, texts: list[tuple[str, str]]) -> np.ndarray:
        sequences, starts = encoded_from(tokenizer, texts)
        if self.ask == "content":
            starts = [1] * len(starts)
        sums = log_likelihoods(model, sequences, starts=starts)
        if self.ask == "letter" or self.normaliser == "none":
            return sums
        if self.normaliser == "unconditional":
            alone, begins = encoded_from(tokenizer, [(before.rpartition("\n")[2], after) for before, after in texts])
            return sums - log_likelihoods(model, alone, starts=begins)
        if self.normaliser == "token":
            return sums / [max(1, len(ids) - start) for ids, start in zip(sequences, starts, strict=True)]
        whole = self.ask == "content"
        return sums / [max(1, len((before if whole else "").encode()) + len(after.encode())) for before, after in texts]

    def _ways(self, row: tuple[str, list[str], int], shown: list[tuple[str, list[str], int]]) -> list[tuple[str, str]]:
        """(before, rest) for each option of an item, behind the solved ones."""
        before = "".join(f"{''.join(self._written(question, options, answer))}\n\n" for question, options, answer in shown)
        question, options, _ = row
        return [(before + head, rest) for head, rest in (self._written(question, options, i) for i in range(len(options)))]

    def _written(self, question: str, options: list[str], choice: int) -> tuple[str, str]:
        listed = "".join(f"\n{_letter(i)}. {option}" for i, option in enumerate(options))
        if self.ask == "letter":
            return filled(question.replace(BLANK, "...") + listed, _letter(choice), self.template)
        head, rest = filled(question, options[choice], self.template)
        return (f"{listed.lstrip()}\n{head}" if self.list_options else head), rest

    def _rows(self) -> list[tuple[str, list[str], int]]:
        found = []
        for number, row in enumerate(self.rows(self.question, self.options, self.answer), 1):
            question, options, answer = str(row[self.question]), row[self.options], row[self.answer]
            if not isinstance(options, list) or len(options) < 2 or not all(isinstance(option, str) and option for option in options):
                raise InputError(f"{self.path}, item {number}: '{self.options}' must be a list of at least two texts, none of them empty.")
            if not isinstance(answer, int) or not 0 <= answer < len(options):
                raise InputError(f"{self.path}, item {number}: '{self.answer}' must be the number of the right option, from 0 to {len(options) - 1}.")
            found.append((question, options, answer))
        if len(found) <= self.shots:
            raise InputError(f"{self.path} holds {len(found)} items, {self.shots} of which are shown solved; none is left to score.")
        return found


def _tied(scores: list[float | None]) -> bool:
    """Whether the two largest of the scores are one."""
    *_, second, first = sorted(-math.inf if score is None else score for score in scores)
    return bool(np.isclose(first, second, rtol=1e-9, atol=1e-9))


def _letter(place: int) -> str:
    return chr(ord("A") + place)
