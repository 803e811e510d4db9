"""The Qwen3 mixtures of experts: Qwen3 with experts in some layers or all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from cairn.catalog import Paper, register
from cairn.models.config import ExpertSizes
from cairn.models.families.routed import RoutedFamily
from cairn.models.families.windowed import Kind, WindowedFamily


@register("architecture", "qwen3_moe", paper=Paper("Qwen3 Technical Report", "arXiv:2505.09388"))
class Qwen3Moe(RoutedFamily, WindowedFamily):
    """Qwen3 mixtures of experts: eight of 128 experts for each token, every head of queries and keys normalised (section 2)."""

    model_type: ClassVar[str] = "qwen3_moe"
    hf_class: ClassVar[str] = "Qwen3MoeForCausalLM"
    silent: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06,
        "sliding_window": 4096,
    }
    norms: ClassVar[Literal["pre", "post", "both"]] = "pre"
    qk_norm: ClassVar[Literal["none", "all", "head"]] = "head"
    unwritten: ClassVar[frozenset[str]] = frozenset({"mlp_bias", "layer_types"})
    neutral: ClassVar[dict[str, Any]] = {"mlp_bias": False}

    moe_intermediate_size: int = Field(768, ge=1)
    """Inner size of an expert; `intermediate_size` is that of layers without experts."""
    decoder_sparse_step: int = Field(1, ge=1)
    """Every so many layers one has experts."""
    mlp_only_layers: list[int] = []
    """Layers without experts."""

    @property
    def expert_size(self) -> int:
        return self.moe_intermediate_size

    def experts_of(self, layer: int) -> ExpertSizes | None:
        without = layer in self.mlp_only_layers or (layer + 1) % self.decoder_sparse_step
        return None if without else super().experts_of(layer)

    def pattern(self, layer: int) -> Kind:
        return "sliding_attention"

    def to_hf(self) -> dict[str, Any]:
        return {**super().to_hf(), "use_sliding_window": self.sliding_window is not None}

    @classmethod
    def _also(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return super()._also(config) | ({} if config.get("use_sliding_window") else {"sliding_window": None})
