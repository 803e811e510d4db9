"""Multiple choice by likelihood, as for HellaSwag: which continuation of a context does the model find most probable?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3
from pydantic import Field

from cairn.catalog import Paper, register
from cairn.errors import InputError, NotFoundError
from cairn.evaluate.measure import Measurement, Score
from cairn.evaluate.scoring import log_likelihoods
from cairn.evaluate.statistics import binomial_error

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.feed import Feed
    from cairn.data.tokenizer import Tokenizer


@register("measurement", "multiple-choice", paper=Paper("HellaSwag: Can a Machine Really Finish Your Sentence?", "arXiv:1905.07830"))
class MultipleChoice(Measurement):
    """Share of items whose right continuation is the most probable: by its sum (`accuracy`), and by its sum per byte
    (`accuracy_per_byte`), which does not favour short ones. Ties go to the first."""

    path: Path
    """JSON lines, one item each."""
    context: str = "ctx"
    """Key of the text before the continuation; the defaults are HellaSwag's."""
    choices: str = "endings"
    """Key of the list of continuations; each follows the context after a space."""
    answer: str = "label"
    """Key of the number of the right one, from 0."""
    items: int | None = Field(None, ge=1)
    """How many, the first ones; default: all."""

    def data_digest(self, feed: Feed | None = None) -> str:
        return blake3(self._file().read_bytes()).hexdigest()

    def protocol(self, feed: Feed | None = None) -> dict[str, Any]:
        described = super().protocol(feed)
        del described["path"]  # the digest of its contents says which items, wherever they lie
        return described

    def of(self, model: nn.Module, tokenizer: Tokenizer, feed: Feed | None = None) -> list[Score]:
        items = self._items()
        begin = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
        sequences, starts, sizes = [], [], []
        for context, choices, _ in items:
            for choice in choices:
                # Encoded together and split by the length of the context alone: the space belongs to the continuation.
                whole = begin + tokenizer.encode(f"{context} {choice}")
                sequences.append(whole)
                starts.append(max(1, min(len(begin) + len(tokenizer.encode(context)), len(whole) - 1)))
                sizes.append(len(f" {choice}".encode()))
        scores = log_likelihoods(model, sequences, starts=starts)
        ends = np.cumsum([len(choices) for _, choices, _ in items])[:-1]
        chance = float(np.mean([1 / len(choices) for _, choices, _ in items]))
        found = []
        for metric, values in (("accuracy", scores), ("accuracy_per_byte", scores / np.array(sizes))):
            right = sum(int(np.argmax(part)) == answer for part, (_, _, answer) in zip(np.split(values, ends), items, strict=True))
            found.append(Score("multiple-choice", metric, right / len(items), binomial_error(right, len(items)), len(items), chance))
        return found

    def _file(self) -> Path:
        if not self.path.is_file():
            raise NotFoundError(f"There is no file {self.path} of multiple-choice items.")
        return self.path

    def _items(self) -> list[tuple[str, list[str], int]]:
        lines = [line for line in self._file().read_text(encoding="utf-8").splitlines() if line.strip()][: self.items]
        if not lines:
            raise InputError(f"{self.path} holds no items.")
        return [self._item(number, line) for number, line in enumerate(lines, 1)]

    def _item(self, number: int, line: str) -> tuple[str, list[str], int]:
        where = f"{self.path}, line {number}"
        try:
            row: Any = json.loads(line)
            context, choices, answer = row[self.context], row[self.choices], int(row[self.answer])
        except KeyError as error:
            raise InputError(f"{where} has no key {error}; its keys are {', '.join(sorted(row))}. Set context, choices and answer.") from None
        except (ValueError, TypeError):
            raise InputError(f"{where} is not an item: a JSON object with a text, a list of texts and the number of the right one.") from None
        if not isinstance(context, str) or not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
            raise InputError(f"{where}: '{self.context}' must be a text and '{self.choices}' a list of texts, none of them empty.")
        if not 0 <= answer < len(choices):
            raise InputError(f"{where}: the answer is {answer} and there are {len(choices)} choices; they are counted from 0.")
        return context, choices, answer
