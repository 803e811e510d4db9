"""Rank classification under several prompts, as T0 is evaluated: the option of highest likelihood, and the median over the prompts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from cairn.catalog import Paper, register
from cairn.evaluation.choices import judged
from cairn.evaluation.engine import engine_of
from cairn.evaluation.measure import Score
from cairn.evaluation.measurements.multiple_choice import MultipleChoice
from cairn.statistics import binomial_error

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.order.feed import Feed
    from cairn.data.text.tokenizer import Tokenizer


@register(
    "measurement",
    "rank-classification",
    paper=Paper("What Language Model Architecture and Pretraining Objective Work Best for Zero-Shot Generalization?", "arXiv:2204.05832", card=14),
)
class RankClassification(MultipleChoice):
    """Share of items of a file whose right option is the most probable one, for each of several prompts: median, lowest and highest (section 3.4)."""

    prompts: list[str] = Field(min_length=1)
    """Templates of what stands before an option, such as `{question}\\nAnswer:`; `context` is not used. A prefix decoder or an encoder reads
    them as a whole, and options are scored by the sum over their tokens."""

    def of(self, model: nn.Module, tokenizer: Tokenizer, feed: Feed | None = None) -> list[Score]:
        ways = [self.model_copy(update={"context": prompt}).questions(tokenizer, feed) for prompt in self.prompts]
        pairs = [(item.context, choice) for items in ways for item in items for choice in item.choices]
        scores = np.array([scored.logprob for scored in engine_of(model, tokenizer).loglikelihood(pairs)])
        ends = np.cumsum([sum(len(item.choices) for item in items) for items in ways])[:-1]
        found = [judged(self.title(), items, part)[0] for items, part in zip(ways, np.split(scores, ends), strict=True)]
        n, chance = found[0].n, found[0].chance
        each = np.array([f.value for f in found])
        values = {"accuracy": float(np.median(each)), "lowest": float(each.min()), "highest": float(each.max())}  # nan where one is
        errors = {metric: binomial_error(round(value * n), n) if math.isfinite(value) else math.nan for metric, value in values.items()}
        return [Score(self.title(), metric, value, errors[metric], n, chance) for metric, value in values.items()]
