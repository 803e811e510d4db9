"""The Mistral family: LLaMA with a sliding window in every layer, or in none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from cairn.catalog import Paper, register
from cairn.models.families.windowed import Kind, WindowedFamily


@register("architecture", "mistral", paper=Paper("Mistral 7B", "arXiv:2310.06825"))
class Mistral(WindowedFamily):
    """Mistral: LLaMA whose layers all look back at a window (section 2)."""

    model_type: ClassVar[str] = "mistral"
    hf_class: ClassVar[str] = "MistralForCausalLM"
    silent: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-06,
        "sliding_window": 4096,
    }
    norms: ClassVar[Literal["pre", "post", "both"]] = "pre"
    unwritten: ClassVar[frozenset[str]] = frozenset({"mlp_bias", "attention_bias", "layer_types"})
    neutral: ClassVar[dict[str, Any]] = {"attention_bias": False, "mlp_bias": False}

    def pattern(self, layer: int) -> Kind:
        return "sliding_attention"

    def to_hf(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_hf().items() if key != "layer_types"}
