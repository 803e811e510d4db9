"""What a study is: a protocol, figures for each seed, and a check stated in advance.

A study's `run` makes the figures of one seed; with `sabotage` it makes them with the decisive ingredient taken away, and
the same check must then fail. A check that would pass anyway proves nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cairn.options import Options

Say = Callable[[str], object]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Criterion:
    """One condition of a check: what must hold, what was found, and whether it does.

    An `exact` criterion must hold at any scale; another one that does not hold may just not show at ours.
    """

    name: str
    required: str
    found: str
    passed: bool
    exact: bool = False


class Study(Options, ABC):
    """Base of all studies. Its catalog entry names the paper and the card."""

    minutes: ClassVar[float]
    """About how long it takes on two cores, all seeds and the control."""
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2)
    published: ClassVar[str]
    """What the paper reports."""
    protocol: ClassVar[str]
    """What is done here, in words, before it is done."""
    control: ClassVar[str]
    """What the negative control takes away."""

    @abstractmethod
    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        """The figures of one seed as plain values; everything on disk goes under `work`, which is empty."""

    @abstractmethod
    def check(self, runs: Sequence[Figures]) -> list[Criterion]:
        """The conditions, computed from the figures of all seeds."""

    def also(self, runs: Sequence[Figures]) -> dict[str, str]:
        """What is reported and judged by no condition, by name; by default nothing."""
        return {}

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        """Draw the figures into a PNG; by default nothing is drawn."""


def verdict(criteria: Sequence[Criterion]) -> str:
    """`holds`, `partly`, `not at this scale` or `fails`.

    `fails` when a condition that must hold at any scale does not; `not at this scale` when none of the others does.
    """
    if all(criterion.passed for criterion in criteria):
        return "holds"
    if any(criterion.exact and not criterion.passed for criterion in criteria):
        return "fails"
    return "partly" if any(criterion.passed and not criterion.exact for criterion in criteria) else "not at this scale"
