"""Coefficients: one number for all tensors, or one per pattern of tensor names, the first that matches.

scale=0.4
scale={"*.mlp.*": 0.6, "model.embed_tokens.weight": 0.0, "*": 0.4}
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from cairn.errors import InputError, suggestion

T = TypeVar("T")
Coefficient = float | dict[str, float]
"""A number, or patterns of tensor names with a number each."""
Weights = list[float] | dict[str, list[float]]
"""One number per checkpoint, or patterns of tensor names with such a list each."""


@dataclass(frozen=True)
class Range:
    """Where a search looks for an option: from `low` to `high`, evenly or by factors; `each` asks for one number per checkpoint."""

    low: float
    high: float
    factors: bool = False
    each: bool = False

    def at(self, share: float) -> float:
        """The value at a share in [0, 1] of the way."""
        return self.low * (self.high / self.low) ** share if self.factors else self.low + share * (self.high - self.low)


def at(value: T | dict[str, T], name: str) -> T:
    """What a coefficient is for one tensor."""
    if not isinstance(value, dict):
        return value
    return next(number for pattern, number in value.items() if fnmatchcase(name, pattern))


def check_patterns(option: str, value: Any, names: Iterable[str]) -> None:
    """Raise `InputError` unless every tensor finds a pattern and every pattern is the first for some tensor."""
    if not isinstance(value, dict):
        return
    names, used = list(names), set()
    for name in names:
        matching = next((pattern for pattern in value if fnmatchcase(name, pattern)), None)
        if matching is None:
            raise InputError(f"{option}: no pattern matches the tensor '{name}'; end the patterns with '*' for all others.")
        used.add(matching)
    unused = next((pattern for pattern in value if pattern not in used), None)
    if unused is not None:
        raise InputError(f"{option}: the pattern '{unused}' decides for no tensor.{suggestion(unused, names)}")


def check_weights(option: str, value: Weights | None, count: int, of: str) -> None:
    """Raise `InputError` unless every list has one number per checkpoint."""
    lists: Sequence[list[float]] = list(value.values()) if isinstance(value, dict) else [value] if value is not None else []
    for numbers in lists:
        if len(numbers) != count:
            raise InputError(f"{option} has {len(numbers)} values and {count} {of} were given; give one per {of.rstrip('s')}.")
