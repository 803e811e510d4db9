"""The SmolLM3 family: LLaMA in which every fourth layer does not turn queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cairn.catalog import Paper, register
from cairn.models.families.windowed import Kind, WindowedFamily


@register("architecture", "smollm3", paper=Paper("RoPE to NoPE and Back Again: A New Hybrid Attention Strategy", "arXiv:2501.18795"))
class SmolLM3(WindowedFamily):
    """SmolLM3: layers without positions between layers with rope."""

    model_type: ClassVar[str] = "smollm3"
    hf_class: ClassVar[str] = "SmolLM3ForCausalLM"
    silent: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06,
    }
    norms: ClassVar[Literal["pre", "post", "both"]] = "pre"
    unwritten: ClassVar[frozenset[str]] = frozenset()

    rope_theta: float = Field(2000000.0, gt=0)
    tie_word_embeddings: bool = True
    no_rope_layers: list[Literal[0, 1]] | None = None
    """For each layer 1 where it turns queries and keys, 0 where it does not (transformers' name says the opposite); None: every
    `no_rope_layer_interval`-th does not."""
    no_rope_layer_interval: int = Field(4, ge=1)

    @model_validator(mode="after")
    def _a_choice_for_each_layer(self) -> Self:
        if self.no_rope_layers is not None and len(self.no_rope_layers) != self.num_hidden_layers:
            raise ValueError(f"no_rope_layers names {len(self.no_rope_layers)} layers of {self.num_hidden_layers}; give one for each, or leave it out.")
        return self

    def rotary_of(self, layer: int) -> Literal["global", "local", "none"]:
        turns = self.no_rope_layers[layer] if self.no_rope_layers is not None else (layer + 1) % self.no_rope_layer_interval != 0
        return "global" if turns else "none"

    def pattern(self, layer: int) -> Kind:
        return "sliding_attention" if self.sliding_window is not None and self.rotary_of(layer) == "none" else "full_attention"

    def to_hf(self) -> dict[str, Any]:
        turns = [int(self.rotary_of(layer) == "global") for layer in range(self.num_hidden_layers)]
        return {**super().to_hf(), "no_rope_layers": turns, "use_sliding_window": self.sliding_window is not None}

    @classmethod
    def _also(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {} if config.get("use_sliding_window") else {"sliding_window": None, "layer_types": None}
