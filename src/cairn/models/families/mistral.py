"""The Mistral family: LLaMA with a sliding window in every layer, or in none."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from cairn.catalog import Paper, register
from cairn.models.families.windowed import Kind, WindowedFamily


@register("architecture", "mistral", paper=Paper("Mistral 7B", "arXiv:2310.06825"))
class Mistral(WindowedFamily):
    """Mistral: LLaMA whose layers all look back at a window (section 2)."""

    model_type: ClassVar[str] = "mistral"
    hf_class: ClassVar[str] = "MistralForCausalLM"
    norms: ClassVar[Literal["pre", "post", "both"]] = "pre"
    unwritten: ClassVar[frozenset[str]] = frozenset({"mlp_bias", "attention_bias", "layer_types"})
    neutral: ClassVar[dict[str, Any]] = {"attention_bias": False, "mlp_bias": False}

    def pattern(self, layer: int) -> Kind:
        return "sliding_attention"

    def to_hf(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_hf().items() if key != "layer_types"}
