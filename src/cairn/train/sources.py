"""From a recipe's `data` to a tokenizer and a feed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cairn.data.feed import Feed, SourceSpec
from cairn.data.tokenizer import Tokenizer, resolve_tokenizer
from cairn.data.tokens import Selection, TokenStore, prepare_cached
from cairn.errors import InputError
from cairn.train.recipe import Data, Recipe

if TYPE_CHECKING:
    from collections.abc import Callable


def open_data(data: Data, seed: int, tokenizer: Tokenizer | None = None, progress: Callable[..., Any] | None = None) -> tuple[Tokenizer, Feed]:
    """The tokenizer and the feed that `data` describes; token files are prepared, or taken from the cache."""
    tokenizer = tokenizer or resolve_tokenizer(data.tokenizer, [source.corpus for source in data.sources.values()])
    metadata, cooldown = data.metadata, data.metadata is not None and bool(data.metadata.reserved)

    def store(name: str, corpus: Any, after: bool) -> TokenStore:
        """A source's documents; those of the cooldown are of their own and have no metadata."""
        selection, tail = None, (metadata.reserved or 0.0) if metadata is not None else 0.0
        if metadata is not None:
            selection = Selection(None if after else metadata, (("source", name),), (1 - tail, 1.0) if after else (0.0, 1 - tail))
        return prepare_cached(corpus, tokenizer, held_out=data.held_out, progress=progress, selection=selection)

    specs = [
        SourceSpec(name, store(name, source.corpus, False), source.weight, store(name, source.corpus, True) if cooldown else None)
        for name, source in data.sources.items()
    ]
    switch = metadata.until.tokens(data.sequence_length) // data.sequence_length if metadata is not None and cooldown else None
    return tokenizer, Feed(specs, data.sequence_length, seed, packing=data.packing, documents=data.documents, switch=switch)


def fitted(recipe: Recipe, tokenizer: Tokenizer) -> Recipe:
    """The recipe with the model's vocabulary and end-of-text id taken from the tokenizer where the recipe leaves them open.

    Raises `InputError` when the vocabulary that the recipe gives is too small for the tokenizer.
    """
    given = recipe.model.model_fields_set
    found = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_id, "bos_token_id": tokenizer.eos_id}
    recipe = recipe.changed({f"model.{key}": value for key, value in found.items() if key not in given})
    if recipe.model.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"model.vocab_size ({recipe.model.vocab_size}) is smaller than the tokenizer's vocabulary ({tokenizer.vocab_size}); "
            "leave it out to take the tokenizer's."
        )
    if recipe.data.sequence_length > recipe.model.max_position_embeddings:
        if "max_position_embeddings" in given:
            raise InputError(
                f"data.sequence_length ({recipe.data.sequence_length}) is longer than model.max_position_embeddings ({recipe.model.max_position_embeddings})."
            )
        recipe = recipe.changed({"model.max_position_embeddings": recipe.data.sequence_length})
    return recipe
