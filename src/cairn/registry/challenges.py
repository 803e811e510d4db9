"""What people find difficult when they reuse a model, as data: each category has a question and what answers it here."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources

import yaml

from cairn.errors import CairnError, DamagedError, DivergedError, MismatchError, NotFoundError, ResumeError, suggestion


@dataclass(frozen=True)
class Challenge:
    """One category: what people ask, and which command or page answers."""

    id: str
    title: str
    asks: str
    answer: str


_OF_ERRORS: dict[type[CairnError], str] = {
    ResumeError: "training-pipeline",
    DivergedError: "training-pipeline",
    DamagedError: "integrity",
    MismatchError: "model-understanding",
    NotFoundError: "model-selection",
}


@functools.cache
def known() -> dict[str, Challenge]:
    """All categories, by id."""
    table = yaml.safe_load(resources.files("cairn.registry").joinpath("challenges.yaml").read_text(encoding="utf-8"))
    return {name: Challenge(name, **entry) for name, entry in table.items()}


def get(name: str) -> Challenge:
    """One category. Raises `NotFoundError` that names the nearest."""
    if name not in known():
        raise NotFoundError(f"There is no category '{name}'.{suggestion(name, known())}")
    return known()[name]


def doctor(category: str | None = None) -> list[Challenge]:
    """What people find difficult when they reuse a model, and what answers it.

    Parameters
    ----------
    category
        A category, as an error names it; default: all.

    Raises
    ------
    NotFoundError
        For a category that does not exist.

    Examples
    --------
    >>> [challenge.id for challenge in doctor("integrity")]
    ['integrity']
    """
    return [get(category)] if category else list(known().values())


def category_of(error: CairnError) -> str:
    """The category to which an error belongs."""
    return getattr(error, "category", None) or next((category for kind, category in _OF_ERRORS.items() if isinstance(error, kind)), "model-usage")
