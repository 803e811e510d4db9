"""Grade-school word problems by likelihood: is the right number more probable than the results of other problems?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from cairn.catalog import Paper, register
from cairn.data import datasets
from cairn.evaluation.choices import Choices, Item
from cairn.randomness import seed_for, uniform

if TYPE_CHECKING:
    from cairn.data.order.feed import Feed
    from cairn.data.text.tokenizer import Tokenizer


@register("measurement", "gsm8k", paper=Paper("Training Verifiers to Solve Math Word Problems", "arXiv:2110.14168"))
class Gsm8k(Choices):
    """Share of word problems whose result is more probable than three results of other problems; no solution is written out."""

    problems: int = Field(1319, ge=1, le=1319)
    """The first ones of the test file."""
    choices: int = Field(4, ge=2, le=20)
    """Results to choose among."""
    seed: int = 0
    """Decides which other results, and in which order."""

    def data_digest(self, feed: Feed | None = None) -> str:
        return str(datasets.get("gsm8k").files["test.jsonl"]["blake3"])

    def questions(self, tokenizer: Tokenizer, feed: Feed | None = None) -> list[Item]:
        rows = list(datasets.rows("gsm8k", "test.jsonl"))
        results = [row["answer"].rpartition("####")[2].strip() for row in rows]
        found = []
        for number, row in enumerate(rows[: self.problems]):
            draws = uniform(seed_for(self.seed, "gsm8k", number), np.arange(len(rows) + 1))
            others = list(dict.fromkeys(results[i] for i in np.argsort(draws[1:], kind="stable") if results[i] != results[number]))
            right = int(draws[0] * self.choices)
            chosen = [*others[:right], results[number], *others[right : self.choices - 1]]
            found.append(Item(f"Question: {row['question']}\nAnswer:", tuple(f" {result}" for result in chosen), right))
        return found
