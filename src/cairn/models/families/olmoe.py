"""The OLMoE family: LLaMA with normalised queries and keys, and many small experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cairn.catalog import Paper, register
from cairn.models.families.routed import RoutedFamily


@register("architecture", "olmoe", paper=Paper("OLMoE: Open Mixture-of-Experts Language Models", "arXiv:2409.02060"))
class Olmoe(RoutedFamily):
    """OLMoE: eight of 64 small experts for each token, normalised queries and keys (section 2)."""

    model_type: ClassVar[str] = "olmoe"
    hf_class: ClassVar[str] = "OlmoeForCausalLM"
    silent: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 4096,
    }
    norms: ClassVar[Literal["pre", "post", "both"]] = "pre"
    qk_norm: ClassVar[Literal["none", "all", "head"]] = "all"
    unwritten: ClassVar[frozenset[str]] = frozenset({"mlp_bias"})
    neutral: ClassVar[dict[str, Any]] = {"clip_qkv": None, "mlp_bias": False}

    router_aux_loss_coef: float = Field(0.01, ge=0)

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        if self.head_size * self.num_attention_heads != self.hidden_size:
            raise ValueError(f"the heads of an OLMoE share its width of {self.hidden_size}: leave out head_dim.")
        return self
