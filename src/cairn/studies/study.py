"""What a study is: a protocol, figures for each seed, and a check stated in advance.

A study's `run` makes the figures of one seed; with `sabotage` it makes them with the decisive ingredient taken away, and
the same check must then fail. A check that would pass anyway proves nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import PrivateAttr

from cairn.errors import InputError
from cairn.options import Options
from cairn.studies.conditions import Condition

Say = Callable[[str], object]
Figures = dict[str, Any]


class Study(Options, ABC):
    """Base of all studies. Its catalog entry names the paper and the card."""

    catalog_kind: ClassVar[str] = "study"

    minutes: ClassVar[float]
    """About how long it takes on two cores, all seeds and the control."""
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2)
    published: ClassVar[str]
    """What the paper reports."""
    protocol: ClassVar[str]
    """What is done here, in words, before it is done."""
    reads: ClassVar[tuple[Any, ...]] = ()
    """Corpora that only processes of its own read; those that this process reads are noted by themselves."""
    control: ClassVar[str]
    """What the negative control takes away."""

    _honest: dict[int, Figures] = PrivateAttr(default_factory=dict)

    def remember(self, seed: int, figures: Figures) -> None:
        """Keep the figures of an honest run for the control of the same seed."""
        self._honest[seed] = figures

    def honest(self, seed: int) -> Figures:
        """The figures of the honest run of a seed, from which a control takes what it does not change. Raises `InputError` before that run."""
        if seed not in self._honest:
            raise InputError(f"The control of seed {seed} shares arms with the honest run of that seed, which is not there; run the whole study.")
        return self._honest[seed]

    @abstractmethod
    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        """The figures of one seed as plain values; everything on disk goes under `work`, which is empty."""

    @abstractmethod
    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        """The conditions, computed from the figures of all seeds."""

    def also(self, runs: Sequence[Figures]) -> dict[str, str]:
        """What is reported and judged by no condition, by name; by default nothing."""
        return {}

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        """Draw the figures into a PNG; by default nothing is drawn."""
