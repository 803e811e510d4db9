"""Which keys the small files of a checkpoint have, and of which kinds: strict models, like those of a recipe.

Only what this package reads is named. Other programs write further keys, which pass through as they are.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

LARGEST_WHOLE = 2**53
"""No count, size or position is larger: up to here every program reads the same number out of JSON."""

Whole = Annotated[int, Field(ge=0, le=LARGEST_WHOLE)]
Size = Whole | list[Whole] | None
"""A size of a network; some families give one for each layer."""


class File(BaseModel):
    """Base of all of them: kinds are strict (a number in quotes is no number), keys that are not named are kept."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())


class Config(File):
    """config.json."""

    model_type: str | None = None
    architectures: list[str] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    tie_word_embeddings: bool | None = None
    text_config: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | list[int] | None = None
    vocab_size: Size = None
    hidden_size: Size = None
    intermediate_size: Size = None
    num_hidden_layers: Size = None
    num_attention_heads: Size = None
    num_key_value_heads: Size = None
    head_dim: Size = None
    max_position_embeddings: Size = None


class Generation(File):
    """generation_config.json."""

    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | list[int] | None = None


class TokenizerConfig(File):
    """tokenizer_config.json."""

    bos_token: str | dict[str, Any] | None = None
    eos_token: str | dict[str, Any] | None = None
    unk_token: str | dict[str, Any] | None = None
    pad_token: str | dict[str, Any] | None = None
    chat_template: str | list[dict[str, Any]] | dict[str, Any] | None = None
    added_tokens_decoder: dict[str, dict[str, Any]] | None = None


class Index(File):
    """The index of numbered files: in which one each tensor stands."""

    weight_map: dict[str, str]


def _mixture(history: list[Any]) -> list[Any]:
    for entry in history:
        weights = entry[1] if isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is int and 0 <= entry[0] <= LARGEST_WHOLE else None
        numbers = list(weights.values()) if isinstance(weights, dict) else []
        if not numbers or not all(type(n) in (int, float) and math.isfinite(n) and n >= 0 for n in numbers) or not sum(numbers) > 0:
            raise ValueError("a mixture is a list of [first sequence, {source: weight}]")
    return history


Mixture = Annotated[list[Any], AfterValidator(_mixture)]
"""The history of a mixture: from which sequence on each source had which weight."""


class Feed(File):
    """What trainer.json says of the data that were read."""

    stores: dict[str, str] = {}
    mixture: Mixture = []
    cursor: dict[str, Any] = {}


class Trainer(File):
    """trainer.json."""

    format: Whole = 1
    step: Whole
    tokens: Whole | None = None
    samples: Whole | None = None
    position: Whole = 0
    skipped: Whole = 0
    feed: Feed | None = None
    callbacks: dict[str, Any] = {}
    teachers: dict[str, str | None] = {}


def ids(value: int | list[int] | None) -> list[int]:
    """Ids as a config writes them: one, a list, or none."""
    return list(value) if isinstance(value, list) else [] if value is None else [value]
