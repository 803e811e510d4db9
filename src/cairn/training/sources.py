"""From a recipe's `data` to a preprocessor and a feed, and from these to a recipe with nothing left open."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cairn import catalog
from cairn.checkpoint.format import trust
from cairn.data import datasets
from cairn.errors import InputError
from cairn.options import Options, method_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from cairn.data.order.feed import Feed
    from cairn.training.fields import DataField
    from cairn.training.objectives import Objective, Setting
    from cairn.training.recipe import Recipe

ALWAYS_THERE = ("python-docs", "python-source", "dataset")
"""Corpora that are what they are wherever they are named: texts of this Python installation, and named data sets with their digests."""


def open_data(
    data: DataField, seed: int, preprocessor: Any = None, progress: Callable[..., Any] | None = None, *, objective: Objective | None = None
) -> tuple[Any, Feed]:
    """The preprocessor and the feed that `data` describes, ready for `objective`; what has to be prepared is prepared, or taken from the cache."""
    return data.open(seed, preprocessor, objective=objective, progress=progress)


def open_recorded(data: DataField, seed: int, preprocessor: Any = None, *, objective: Objective | None = None) -> tuple[Any, Feed]:
    """As `open_data`, for `data` that a checkpoint names. Raises `InputError` for what only a file names: that of a stranger may name anything."""
    refuse_unnamed(data)
    return open_data(data, seed, preprocessor, objective=objective)


def refuse_unnamed(data: DataField) -> None:
    """Raise `InputError` for data that only a file names."""
    unnamed = next((corpus for corpus in corpora_of(data).values() if not trust.known("data", corpus)), None)
    if unnamed is not None:
        raise InputError(
            f"The recipe that the checkpoint carries names the data {unnamed[:300]}, which are not opened because a file says so; --follow opens them, "
            "and so does naming them yourself (data.sources.NAME.corpus=PATH, or corpus=PATH of a measurement)."
        )


def go_on_reading(data: DataField) -> None:
    """For this process, files of this machine that a run reads are known: a run that is resumed goes on with its data, on a new machine too,
    where nobody has named them. What lies in a store or on a hub is still asked for."""
    for corpus in corpora_of(data).values():
        if "://" not in corpus and '"name": "hf"' not in corpus:
            trust.allow("data", corpus)


def corpora_of(data: DataField) -> dict[str, str]:
    """What the sources of a recipe read from the machine or a network, in words, by source; named data sets and this Python's own texts do not count."""
    found = {name: _place_of(getattr(source, data.source_key)) for name, source in data.sources.items()}
    return {name: place for name, place in found.items() if place is not None}


def _place_of(corpus: Any) -> str | None:
    if isinstance(corpus, Options):
        corpus = method_options(corpus)
    if isinstance(corpus, Mapping):
        return None if corpus.get("name") in ALWAYS_THERE else json.dumps(corpus, sort_keys=True, default=str)
    text = str(corpus)
    return None if catalog.has("corpus", text) or text in datasets.names() else os.path.abspath(text)


def name_data(asked: DataField, before: DataField | None = None) -> None:
    """Note that the user has named the data of a recipe, but for those that another recipe, which a file holds, names already."""
    known = set(corpora_of(before).values()) if before is not None else set()
    for corpus in corpora_of(asked).values():
        if corpus not in known:
            trust.note("data", corpus)


def fitted(recipe: Recipe, preprocessor: Any) -> Recipe:
    """The recipe with everything filled in that the data decide about the model and that the recipe leaves open, and the objective told
    where it is used.

    Raises `InputError` for a model that cannot read these data, and for an objective that cannot be used on them.
    """
    found = recipe.data.fill(recipe.model, preprocessor)
    recipe = recipe.changed({f"model.{key}": value for key, value in found.items()})
    return recipe.model_copy(update={"objective": recipe.objective.fitted(setting_of(recipe, preprocessor))})


def setting_of(recipe: Recipe, preprocessor: Any) -> Setting:
    """What an objective is told about a run."""
    return recipe.data.setting(recipe.model, preprocessor)
