"""Log-probabilities of token sequences, by the request engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cairn.evaluation.engine import engine_of

if TYPE_CHECKING:
    from torch import nn


def log_likelihoods(
    model: nn.Module, sequences: Sequence[Sequence[int]], batch_tokens: int | None = None, starts: Sequence[int] | None = None
) -> NDArray[np.float64]:
    """Sum of the log-probabilities of the tokens of each sequence from its `starts` on (default: after the first), shape (n,), in nats.

    Sequences of fewer than two tokens score 0; a score that is not finite is nan. See `Engine.score`.
    """
    return np.array([found.logprob for found in engine_of(model, budget_tokens=batch_tokens).score(sequences, starts)])
