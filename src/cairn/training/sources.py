"""From a recipe's `data` to a tokenizer and a feed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cairn.data.order.feed import Feed, SourceSpec
from cairn.data.text.tokenizer import Tokenizer, resolve_tokenizer
from cairn.data.text.tokens import Selection, TokenStore, prepare_cached
from cairn.errors import InputError
from cairn.training.objectives import Setting
from cairn.training.recipe import Data, Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def open_data(
    data: Data, seed: int, tokenizer: Tokenizer | None = None, progress: Callable[..., Any] | None = None, special_tokens: Sequence[str] = ()
) -> tuple[Tokenizer, Feed]:
    """The tokenizer, with `special_tokens` added, and the feed that `data` describes; token files are prepared, or taken from the cache."""
    tokenizer = tokenizer or resolve_tokenizer(data.tokenizer, [source.corpus for source in data.sources.values()])
    tokenizer = tokenizer.extended(special_tokens)
    metadata, tail = data.metadata, (data.metadata.reserved or 0.0) if data.metadata is not None else 0.0

    def store(name: str, after: bool) -> TokenStore:
        """A source's documents; those of the cooldown are of their own and have no metadata."""
        selection = None
        if metadata is not None:
            selection = Selection(None if after else metadata, (("source", name),), (1 - tail, 1.0) if after else (0.0, 1 - tail))
        return prepare_cached(data.sources[name].corpus, tokenizer, held_out=data.held_out, progress=progress, selection=selection)

    specs = []
    for name, weight in data.first_weights.items():
        part = data.sources[name].subset
        specs.append(SourceSpec(name, store(name, False), weight, part and -(-part // data.sequence_length), store(name, True) if tail else None))
    switch = metadata.until.tokens(data.sequence_length) // data.sequence_length if metadata is not None and tail else None
    feed = Feed(specs, data.sequence_length, seed, packing=data.packing, documents=data.documents, filters=data.filters, switch=switch)
    return tokenizer, feed


def fitted(recipe: Recipe, tokenizer: Tokenizer) -> Recipe:
    """The recipe with the model's vocabulary and end-of-text id taken from the tokenizer where the recipe leaves them open, and the
    objective told where it is used.

    Raises `InputError` when the vocabulary that the recipe gives is too small for the tokenizer.
    """
    given = recipe.model.model_fields_set
    found = {"vocab_size": tokenizer.vocab_size, **recipe.model.special_ids(tokenizer.eos_id)}
    recipe = recipe.changed({f"model.{key}": value for key, value in found.items() if key not in given})
    if recipe.model.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"model.vocab_size ({recipe.model.vocab_size}) is smaller than the tokenizer's vocabulary ({tokenizer.vocab_size}); "
            "leave it out to take the tokenizer's, or leave room for the objective's special tokens when a model is begun."
        )
    recipe = recipe.model_copy(update={"objective": recipe.objective.fitted(setting_of(recipe, tokenizer))})
    if recipe.model.max_position_embeddings is None:
        return recipe
    if recipe.data.sequence_length > recipe.model.max_position_embeddings:
        if "max_position_embeddings" in given:
            raise InputError(
                f"data.sequence_length ({recipe.data.sequence_length}) is longer than model.max_position_embeddings ({recipe.model.max_position_embeddings})."
            )
        recipe = recipe.changed({"model.max_position_embeddings": recipe.data.sequence_length})
    return recipe


def setting_of(recipe: Recipe, tokenizer: Tokenizer) -> Setting:
    """What an objective is told about a run."""
    apart = recipe.data.documents == "mask" or recipe.data.packing != "joined"
    return Setting(tokenizer, recipe.model, recipe.data.sequence_length, apart)
