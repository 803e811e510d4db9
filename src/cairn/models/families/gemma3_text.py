"""The text models of Gemma 3: Gemma 2 with normalised heads instead of bounds, and a rotation of their own in layers with a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from cairn.catalog import Paper, register
from cairn.models.config import Architecture
from cairn.models.families.gemma2 import Gemma2
from cairn.models.families.windowed import Kind


@register("architecture", "gemma3_text", paper=Paper("Gemma 3 Technical Report", "arXiv:2503.19786"))
class Gemma3Text(Gemma2):
    """Gemma 3: five layers with a window to one without, each kind with its own rope (section 2)."""

    model_type: ClassVar[str] = "gemma3_text"
    hf_class: ClassVar[str] = "Gemma3ForCausalLM"
    silent: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
    }
    qk_norm: ClassVar[Literal["none", "all", "head"]] = "head"

    rope_theta: float = Field(1000000.0, gt=0)
    rope_local_base_freq: float = Field(10000.0, gt=0)
    """Base of the rotation in layers with a window."""
    attn_logit_softcapping: float | None = Field(None, gt=0)
    final_logit_softcapping: float | None = Field(None, gt=0)

    def pattern(self, layer: int) -> Kind:
        return "sliding_attention" if (layer + 1) % 6 else "full_attention"

    def rotary_of(self, layer: int) -> Literal["global", "local", "none"]:
        return "local" if self.kind_of(layer) == "sliding_attention" else "global"

    def local_rotary(self) -> Architecture:
        return self.model_copy(update={"rope_theta": self.rope_local_base_freq, "rope_scaling": None})

    def to_hf(self) -> dict[str, Any]:
        values = super().to_hf()
        local = {"rope_type": "default", "rope_theta": self.rope_local_base_freq}
        return {**values, "rope_parameters": {"full_attention": values["rope_parameters"], "sliding_attention": local}}

    @classmethod
    def _rope(cls, config: Mapping[str, Any], written: Mapping[str, Any], theta: float | None = None) -> tuple[float, dict[str, Any] | None]:
        return super()._rope(config, written.get("full_attention", written), theta)

    @classmethod
    def _also(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
        found = super()._also(config)
        if isinstance(local, Mapping) and "rope_theta" in local:
            found["rope_local_base_freq"] = local["rope_theta"]
        interval = config.get("sliding_window_pattern")
        if interval and not config.get("layer_types"):
            layers = config.get("num_hidden_layers", cls.model_fields["num_hidden_layers"].default)
            found["layer_types"] = ["sliding_attention" if (i + 1) % interval else "full_attention" for i in range(layers)]
        return found
