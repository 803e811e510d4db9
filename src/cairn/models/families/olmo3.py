"""The OLMo 3 family: OLMo 2 with a window in three of four layers; only full layers have a stretched rope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from cairn.catalog import Paper, register
from cairn.models.config import Architecture
from cairn.models.families.windowed import Kind, WindowedFamily


@register("architecture", "olmo3", paper=Paper("Olmo 3", "arXiv:2512.13961"))
class Olmo3(WindowedFamily):
    """OLMo 3: OLMo 2 whose layers look back at a window, except every fourth."""

    model_type: ClassVar[str] = "olmo3"
    hf_class: ClassVar[str] = "Olmo3ForCausalLM"
    silent: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 50304,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    norms: ClassVar[Literal["pre", "post", "both"]] = "post"
    qk_norm: ClassVar[Literal["none", "all", "head"]] = "all"
    rounds_early: ClassVar[bool] = False
    neutral: ClassVar[dict[str, Any]] = {"mlp_bias": False}

    rope_theta: float = Field(500000.0, gt=0)
    sliding_window: int | None = Field(4096, ge=1)
    initializer_cutoff: float | None = Field(3.0, gt=0)

    def pattern(self, layer: int) -> Kind:
        return "sliding_attention" if (layer + 1) % 4 else "full_attention"

    def rotary_of(self, layer: int) -> Literal["global", "local", "none"]:
        return "local" if self.rope_scaling is not None and self.kind_of(layer) == "sliding_attention" else "global"

    def local_rotary(self) -> Architecture:
        return self.model_copy(update={"rope_scaling": None})

    def to_hf(self) -> dict[str, Any]:
        values = super().to_hf()
        plain = {"rope_type": "default", "rope_theta": self.rope_theta}
        return {**values, "rope_parameters": {"full_attention": values["rope_parameters"], "sliding_attention": plain}}

    @classmethod
    def _rope(cls, config: Mapping[str, Any], written: Mapping[str, Any], theta: float | None = None) -> tuple[float, dict[str, Any] | None]:
        return super()._rope(config, written.get("full_attention", written), theta)
