"""Next token: how often is the token that follows the one that the model finds most probable?

For a model of bytes this is a cloze of characters. Guessing is to say the commonest token of the text each time.
"""

from __future__ import annotations

import numpy as np

from cairn.catalog import Paper, register
from cairn.evaluation.measure import Score
from cairn.evaluation.measurements.held_out import HeldOut, HeldOutWindows
from cairn.statistics import ratio


@register("measurement", "next-token", paper=Paper("Efficient Continual Pre-training by Mitigating the Stability Gap", "arXiv:2406.14833", card=20))
class NextToken(HeldOut):
    """Share of the tokens of the windows of `held-out` that are the most probable ones after those before them."""

    def scores(self, task: str, seen: HeldOutWindows) -> list[Score]:
        right = np.where(np.isnan(seen.logs), np.nan, seen.right)  # where there is no number, there is no most probable token
        accuracy, error = ratio((right * seen.weights).sum(axis=1), seen.weights.sum(axis=1))
        counts = np.bincount(seen.tokens.ravel(), seen.weights.ravel())
        return [Score(task, "accuracy", accuracy, error, len(seen.tokens), chance=float(counts.max() / counts.sum()))]
