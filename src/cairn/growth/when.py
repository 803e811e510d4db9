"""When to grow, and by how much: the published guideline, with its accounting of operations.

log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74,   C = 6 N D

d tokens for the small model, N parameters of the large one, D tokens for a large one from scratch, C operations in all.
"""

from __future__ import annotations

import math
from typing import Any

from cairn.errors import InputError


def growth_tokens(parameters: float, flops: float) -> float:
    """Tokens after which the small model is grown (equation 4), for a large model of N parameters and a budget of C operations."""
    return 10 ** (0.88 * math.log10(parameters) + 163.27 / math.log10(flops) - 5.74)


def when(parameters: float, tokens: float, factor: float = 4.0) -> dict[str, Any]:
    """When to grow a model of `parameters` / `factor` so that the large one is trained for what `tokens` from scratch would cost.

    The fit was made on models of up to 3B parameters; far from there it is an extrapolation. Raises `InputError` for
    numbers below 1, and where the small model alone would use up the budget.
    """
    if parameters < 1 or tokens < 1 or factor < 1:
        raise InputError(
            f"The guideline needs positive counts and a factor of at least 1, not {parameters:g} parameters, {tokens:g} tokens, factor {factor:g}."
        )
    budget = 6 * parameters * tokens
    small = growth_tokens(parameters, budget)
    spent = 6 * parameters / factor * small
    if spent >= budget:
        raise InputError(
            f"For {parameters:g} parameters and {tokens:g} tokens the guideline trains the small model for {small:.3g} tokens, "
            "which is the whole budget: do not grow."
        )
    return {
        "growth_tokens": small,
        "factor": factor,
        "small_parameters": parameters / factor,
        "budget_flops": budget,
        "small_flops": spent,
        "small_share": spent / budget,
        "large_flops": budget - spent,
        "large_tokens": (budget - spent) / (6 * parameters),
    }
