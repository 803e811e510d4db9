"""Families in which some layers, or all, look back at a window of positions only."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cairn.models.families import DecoderFamily

Kind = Literal["full_attention", "sliding_attention"]


class WindowedFamily(DecoderFamily):
    """A decoder whose layers have a kind each: full or sliding attention. A family says by `pattern` what they are where nothing else does."""

    unwritten: ClassVar[frozenset[str]] = frozenset({"mlp_bias"})

    sliding_window: int | None = Field(None, ge=1)
    """Positions that a sliding layer looks back at, its own included."""
    layer_types: list[Kind] | None = None
    """The kind of each layer; None: as the family has it."""

    @model_validator(mode="after")
    def _a_kind_for_each_layer(self) -> Self:
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types names {len(self.layer_types)} layers of {self.num_hidden_layers}; give one for each, or leave it out.")
        if self.attention == "prefix" and any(self.windows):
            raise ValueError("attention=prefix and sliding_window exclude each other: a prefix is seen whole.")
        return self

    def pattern(self, layer: int) -> Kind:
        """The kind of a layer where `layer_types` does not say it."""
        return "full_attention"

    def kind_of(self, layer: int) -> Kind:
        """The kind of a layer."""
        return self.layer_types[layer] if self.layer_types is not None else self.pattern(layer)

    def window_of(self, layer: int) -> int | None:
        return self.sliding_window if self.kind_of(layer) == "sliding_attention" else None

    def to_hf(self) -> dict[str, Any]:
        return {**super().to_hf(), "layer_types": [self.kind_of(layer) for layer in range(self.num_hidden_layers)]}
