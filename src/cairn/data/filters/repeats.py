"""The filter against degenerate text: a short pattern of tokens that stands many times in a row.

A stretch of m + p tokens has period p where m neighbours at distance p are equal; it holds its first p tokens
floor((m + p) / p) times in a row. So a pattern of p tokens stands k times in a row exactly where k p - p consecutive
tokens equal those p places before them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cairn.catalog import Paper, register
from cairn.data.filters import Filter


def repeated(tokens: NDArray[np.int64], longest: int, times: int) -> NDArray[np.bool_]:
    """Whether each row of tokens (n, L) holds a pattern of 1 to `longest` tokens `times` times in a row or more, (n,)."""
    found = np.zeros(len(tokens), dtype=np.bool_)
    for period in range(1, longest + 1):
        need = period * (times - 1)
        if need + period > tokens.shape[1]:
            break
        # After each round a place is true where so many equal neighbours begin; text leaves nothing true after a few.
        equal, have = tokens[:, period:] == tokens[:, :-period], 1
        while have < need and equal.any():
            step = min(have, need - have)
            equal, have = equal[:, step:] & equal[:, :-step], have + step
        found |= equal.any(axis=1)
    return found


@register("filter", "repeats", paper=Paper("2 OLMo 2 Furious", "arXiv:2501.00656"))
class RepeatFilter(Filter):
    """Leave out a sequence in which a pattern of up to `longest` tokens stands `times` times in a row (section 3, repeated n-grams)."""

    longest: int = Field(13, ge=1)
    """Tokens of the longest pattern that is looked for."""
    times: int = Field(32, ge=2)
    """Repetitions from which a sequence is left out."""

    def keeps(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        return ~repeated(tokens, self.longest, self.times)
