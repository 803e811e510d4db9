"""Items with a right answer among several, judged by likelihood: what most tasks of a language model come down to.

accuracy            the right continuation has the highest log-probability (ties go to the first)
accuracy_per_byte   the same per byte, which does not favour short ones
log_likelihood      mean log-probability of the right one: moves long before accuracy does
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cairn.evaluation.answers import proportion
from cairn.evaluation.engine import engine_of
from cairn.evaluation.measure import Measurement, Score
from cairn.statistics import first_largest, mean_error

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.order.feed import Feed
    from cairn.data.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Item:
    """A context, its continuations as they follow it (with the space in front, if there is one), and the number of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int


class Choices(Measurement):
    """Base of measurements that choose among continuations: a subclass says which items there are."""

    @abstractmethod
    def questions(self, tokenizer: Tokenizer, feed: Feed | None = None) -> Sequence[Item]:
        """The items; the same ones each time. At least one."""

    def title(self) -> str:
        """The name of the task in the table."""
        from cairn import catalog

        return catalog.name_of(self) or type(self).__name__

    def of(self, model: nn.Module, tokenizer: Tokenizer, feed: Feed | None = None) -> list[Score]:
        items = self._kept(tokenizer, feed)
        pairs = [(item.context, choice) for item in items for choice in item.choices]
        scores = np.array([scored.logprob for scored in engine_of(model, tokenizer).loglikelihood(pairs)])
        return judged(self.title(), items, scores)

    def _kept(self, tokenizer: Tokenizer, feed: Feed | None) -> Sequence[Item]:
        """The items of the newest few tasks, so that the next checkpoint of a run does not make them again."""
        key = json.dumps([self.protocol(feed), tokenizer.digest], sort_keys=True, default=str)
        found = _items.pop(key, None) or self.questions(tokenizer, feed)
        _items[key] = found
        while len(_items) > 8:
            del _items[next(iter(_items))]
        return found


_items: dict[str, Sequence[Item]] = {}


def judged(task: str, items: Sequence[Item], scores: np.ndarray) -> list[Score]:
    """The scores of a task from the log-probabilities (n,) of all choices of all items, in order."""
    ends = np.cumsum([len(item.choices) for item in items])[:-1]
    sizes = np.array([max(1, len(choice.encode())) for item in items for choice in item.choices])
    chance, n = float(np.mean([1 / len(item.choices) for item in items])), len(items)
    found = []
    for metric, values in (("accuracy", scores), ("accuracy_per_byte", scores / sizes)):
        said = [first_largest(part) for part in np.split(values, ends)]
        found.append(proportion(task, metric, [None if number is None else number == item.answer for number, item in zip(said, items, strict=True)], chance))
    gold = [float(part[item.answer]) for part, item in zip(np.split(scores, ends), items, strict=True)]
    return [*found, Score(task, "log_likelihood", float(np.mean(gold)), mean_error(gold), n)]
