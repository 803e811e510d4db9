"""The recipe of a fork: what it leaves open, the checkpoint that it begins from decides.

A checkpoint says itself what network it is (config.json) and how text becomes tokens. A recipe that goes on from it need not repeat
that; what it says otherwise on purpose is recorded, and what cannot be true of these weights is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cairn import catalog
from cairn.checkpoint.format import read
from cairn.checkpoint.format.read import Checkpoint
from cairn.data.text.tokenizer import Tokenizer, resolve_tokenizer
from cairn.errors import InputError, MismatchError
from cairn.models.config import Network, architecture
from cairn.options import assign, read_assignments
from cairn.training import recipe as recipes
from cairn.training.directory import recipe_of
from cairn.training.recipe import Recipe

FOREIGN = "transformers"
"""The family of what only transformers builds."""
HOW_IT_BEGINS = "initializer"
"""Keys of a model that begin so say how weights are drawn, nothing about the network."""
OF_ONE_CALL = ("truncation", "padding")
"""What a tokenizer.json says for the call after which it was saved."""


def recipe_to_fork(
    checkpoint: str | Path | Checkpoint, overrides: Iterable[str] = (), *, recipe: Recipe | Mapping[str, Any] | str | Path | None = None
) -> Recipe:
    """The recipe with which `fork` would begin."""
    source = checkpoint if isinstance(checkpoint, Checkpoint) else read.open(checkpoint)
    units = source.units or 0
    before = recipe_of(source) if recipe is None or source.trainer is not None else None
    if recipe is None:
        assert before is not None
        # A fork does not inherit the place of its parent's checkpoints, nor the part that it played in a larger recipe.
        values = before.changed({"checkpoint.store": None, "stage": None}).asked()
        values["model"] = {key: value for key, value in values["model"].items() if key == "name" or key.startswith(HOW_IT_BEGINS)}
    else:
        values = recipes.values_of(recipe)
    pairs = [(key, recipes.with_moment(key, value, units, lambda: recipe_of(source).learning_rate(units))) for key, value in read_assignments(overrides)]
    values = _restarted(assign(values, pairs), values, [key for key, _ in pairs])
    values["model"] = continued(values.get("model"), source)
    if source.tokenizer is not None and isinstance(values.get("data"), Mapping) and values["data"].get("name", "text") == "text":
        values["data"] = {**values["data"], "tokenizer": _tokenizer(values["data"].get("tokenizer"), source, before)}
    given = values.get("checkpoint") or {}
    if (lower := stored_dtype(source)) is not None and isinstance(given, Mapping) and given.get("dtype") is None and not values.get("adapter"):
        values["checkpoint"] = {**given, "dtype": lower}
    asked = Recipe.parse(values, f"recipe {recipe}" if isinstance(recipe, (str, Path)) else "recipe")
    if asked.schedule.rewarm.value and not asked.schedule.rewarm_at.value:
        asked = asked.changed({"schedule.rewarm_at": str(units)})
    return asked


def stored_dtype(source: Checkpoint) -> str | None:
    """The lower precision in which a checkpoint holds its weights, which a fork keeps; None for float32 and above, and for an adapter."""
    if source.is_adapter:
        return None
    counts: dict[str, int] = {}
    for tensor in source.tensors.values():
        name = str(tensor.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + math.prod(tensor.shape)
    most = max(counts, key=lambda name: counts[name], default=None)
    return most if most in ("bfloat16", "float16") else None


def _restarted(values: dict[str, Any], before: Mapping[str, Any], given: list[str]) -> dict[str, Any]:
    """A schedule that begins anew, or becomes another one, does not end where the old one ended unless that is said."""
    schedule = values.get("schedule")
    if not isinstance(schedule, dict) or "schedule" in given or "schedule.horizon" in given or ("schedule.start" not in given and "schedule.name" not in given):
        return values
    old = before.get("schedule")
    another = "schedule.name" in given and schedule.get("name") != (old.get("name") if isinstance(old, Mapping) else old)
    if another or "schedule.start" in given:
        values["schedule"] = {key: value for key, value in schedule.items() if key != "horizon"}
    return values


def continued(model: Any, source: Checkpoint) -> dict[str, Any]:
    """What a recipe says of the model, completed by the config.json of the checkpoint whose weights it goes on with.

    Raises `MismatchError` where the recipe names another family.
    """
    given = {"name": model} if isinstance(model, str) else dict(model or {})
    made = _made(source, given.get("name"))
    name = catalog.name_of(made)
    if given.setdefault("name", name) != name:
        raise MismatchError(f"{source.path} is a '{name}', and the recipe's model a '{given['name']}': leave the model out to go on with what is there.")
    stored = {key: getattr(made, key) for key in type(made).model_fields if not key.startswith(HOW_IT_BEGINS)}
    values = {**stored, **given}
    whole = _network(values)
    for key in stored.keys() - given.keys():
        # What follows from the rest (the size of a head, say) stays open, as in a recipe that a person writes.
        less = {k: v for k, v in values.items() if k != key}
        try:
            if _network(less).to_hf() == whole.to_hf():
                values = less
        except InputError:
            continue  # without it the sizes do not fit
    return values


def _made(source: Checkpoint, name: str | None) -> Network:
    """The network of a checkpoint: of a family of ours, or, where the recipe says so or there is none, the one that transformers builds."""
    if name != FOREIGN and source.config.get("model_type") in catalog.names("architecture"):
        return architecture(source.config)
    made: Network = catalog.get("architecture", FOREIGN).implementation.from_hf(source.config)
    return made


def _network(values: Mapping[str, Any]) -> Network:
    entry = catalog.get("architecture", str(values["name"]))
    return entry.implementation.parse({key: value for key, value in values.items() if key != "name"}, "recipe: model")


def of_source(asked: Recipe, source: Checkpoint) -> Recipe:
    """A recipe whose model is completed by the checkpoint that it begins from."""
    values = asked.asked()
    return asked.model_copy(update={"model": _network(continued(values["model"], source))})


def differences(asked: Recipe, source: Checkpoint) -> dict[str, tuple[Any, Any]]:
    """What a recipe says of the network otherwise than the checkpoint's config.json: `{key: (there, here)}`."""
    there, here = _made(source, catalog.name_of(asked.model)).to_hf(), asked.model.to_hf()
    keys = sorted(key for key in there.keys() | here.keys() if not key.startswith(HOW_IT_BEGINS) and there.get(key) != here.get(key))
    found = {f"model.{key}": (there.get(key), here.get(key)) for key in keys}
    dtypes = stored_dtype(source) or "float32", asked.checkpoint.dtype or "float32"
    return found | ({"checkpoint.dtype": dtypes} if dtypes[0] != dtypes[1] and asked.adapter is None else {})


def _tokenizer(asked: Any, source: Checkpoint, before: Recipe | None) -> Any:
    """How the recipe of a fork names its tokenizer, which is the checkpoint's own. Raises `InputError` where it asks for another one."""
    own = getattr(before.data, "tokenizer", None) if before is not None else None
    own = own or str(source.path)
    if asked is None or asked == own:
        return own
    if isinstance(asked, (str, Path)) and _meaning(resolve_tokenizer(asked)) == _meaning(source.tokenizer):
        return str(asked)
    raise InputError(
        f"{source.path} has a tokenizer of its own ({own}), and a fork keeps it: leave data.tokenizer out instead of asking for {asked}. "
        "Another vocabulary needs other embeddings; a model with one is trained from scratch."
    )


def _meaning(tokenizer: Tokenizer) -> Any:
    return {key: value for key, value in json.loads(tokenizer.definition).items() if key not in OF_ONE_CALL}
