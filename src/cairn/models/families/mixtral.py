"""The Mixtral family: Mistral with a choice of experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from cairn.catalog import Paper, register
from cairn.models.families.routed import RoutedFamily
from cairn.models.families.windowed import Kind, WindowedFamily


@register("architecture", "mixtral", paper=Paper("Mixtral of Experts", "arXiv:2401.04088"))
class Mixtral(RoutedFamily, WindowedFamily):
    """Mixtral: two of eight experts for each token, whose weights add up to 1 (section 2.1)."""

    model_type: ClassVar[str] = "mixtral"
    hf_class: ClassVar[str] = "MixtralForCausalLM"
    silent: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    }
    norms: ClassVar[Literal["pre", "post", "both"]] = "pre"
    mlp_name: ClassVar[str] = "block_sparse_moe"
    expert_names: ClassVar[tuple[str, str, str]] = ("w1", "w3", "w2")
    wide_weights: ClassVar[bool] = True
    unwritten: ClassVar[frozenset[str]] = frozenset({"mlp_bias", "attention_bias", "layer_types", "norm_topk_prob"})
    neutral: ClassVar[dict[str, Any]] = {"attention_bias": False, "mlp_bias": False, "router_jitter_noise": 0.0, "norm_topk_prob": True}

    rope_theta: float = Field(1000000.0, gt=0)
    norm_topk_prob: bool = True

    def pattern(self, layer: int) -> Kind:
        return "sliding_attention"
