"""The Phi-3 family: LLaMA whose projections are fused, with long ropes and, in Phi-4-mini, partly rotated heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cairn.catalog import Paper, register
from cairn.models.families.windowed import Kind, WindowedFamily

LONG = ("longrope", "su", "yarn")
"""What the long rope has been called in files of this family."""


@register("architecture", "phi3", paper=Paper("Phi-3 Technical Report", "arXiv:2404.14219"))
class Phi3(WindowedFamily):
    """Phi-3, Phi-3.5 and Phi-4 (mini): fused projections, long ropes (section 2)."""

    model_type: ClassVar[str] = "phi3"
    hf_class: ClassVar[str] = "Phi3ForCausalLM"
    silent: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
    }
    norms: ClassVar[Literal["pre", "post", "both"]] = "pre"
    fused: ClassVar[bool] = True
    unwritten: ClassVar[frozenset[str]] = frozenset({"mlp_bias", "attention_bias", "layer_types"})
    neutral: ClassVar[dict[str, Any]] = {"attention_bias": False, "mlp_bias": False}

    partial_rotary_factor: float = Field(1.0, gt=0, le=1)
    """Share of each head that is rotated."""
    original_max_position_embeddings: int = Field(4096, ge=1)
    """Length beyond which a long rope takes its long factors."""

    @model_validator(mode="after")
    def _long_or_plain(self) -> Self:
        scaling = self.rope_scaling
        if scaling is None:
            return self
        if scaling["rope_type"] != "longrope":
            raise ValueError(f"rope_scaling: a Phi-3 has the plain rope or longrope, not '{scaling['rope_type']}'.")
        for key in ("short_factor", "long_factor"):
            if len(scaling[key]) != self.rotary_size // 2:
                raise ValueError(f"rope_scaling: {key} has {len(scaling[key])} numbers and needs {self.rotary_size // 2}, one for each pair.")
        return self

    @property
    def rotary_size(self) -> int:
        return int(self.head_size * self.partial_rotary_factor)

    def pattern(self, layer: int) -> Kind:
        return "sliding_attention"

    def to_hf(self) -> dict[str, Any]:
        values = {key: value for key, value in super().to_hf().items() if key != "layer_types"}
        return {**values, "rope_parameters": {**values["rope_parameters"], "partial_rotary_factor": self.partial_rotary_factor}}

    @classmethod
    def _rope(cls, config: Mapping[str, Any], written: Mapping[str, Any], theta: float | None = None) -> tuple[float, dict[str, Any] | None]:
        base, scaling = super()._rope(config, written, theta)
        if scaling is not None and scaling.get("rope_type", scaling.get("type")) in LONG:
            original = config.get("original_max_position_embeddings") or cls.model_fields["original_max_position_embeddings"].default
            scaling = {"original_max_position_embeddings": original, **scaling, "rope_type": "longrope"}
        return base, scaling

    @classmethod
    def _also(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        share = (config.get("rope_parameters") or {}).get("partial_rotary_factor") or config.get("partial_rotary_factor")
        return {} if share is None else {"partial_rotary_factor": share}
