"""From a recipe's `data` to a preprocessor and a feed, and from these to a recipe with nothing left open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from cairn.data.order.feed import Feed
    from cairn.training.fields import DataField
    from cairn.training.objectives import Objective, Setting
    from cairn.training.recipe import Recipe


def open_data(
    data: DataField, seed: int, preprocessor: Any = None, progress: Callable[..., Any] | None = None, *, objective: Objective | None = None
) -> tuple[Any, Feed]:
    """The preprocessor and the feed that `data` describes, ready for `objective`; what has to be prepared is prepared, or taken from the cache."""
    return data.open(seed, preprocessor, objective=objective, progress=progress)


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
