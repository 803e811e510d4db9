"""The Granite family: LLaMA with four factors that keep sizes apart from widths and depths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from cairn.catalog import Paper, register
from cairn.models.families import DecoderFamily


@register("architecture", "granite", paper=Paper("Power Scheduler: A Batch Size and Token Number Agnostic Learning Rate Scheduler", "arXiv:2408.13359"))
class Granite(DecoderFamily):
    """Granite 3: factors on embeddings, residuals, scores and logits, as width transfer (muP) asks for."""

    model_type: ClassVar[str] = "granite"
    hf_class: ClassVar[str] = "GraniteForCausalLM"
    silent: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-06,
    }
    norms: ClassVar[Literal["pre", "post", "both"]] = "pre"

    embedding_multiplier: float = Field(1.0, gt=0)
    residual_multiplier: float = Field(1.0, gt=0)
    attention_multiplier: float = Field(1.0, gt=0)
    """Factor on the products of queries and keys; 1/sqrt of a head's size is the usual one."""
    logits_scaling: float = Field(1.0, gt=0)
    """What logits are divided by."""

    @property
    def embedding_scale(self) -> float:
        return self.embedding_multiplier

    @property
    def residual_scale(self) -> float:
        return self.residual_multiplier

    @property
    def attention_scale(self) -> float:
        return self.attention_multiplier

    @property
    def logit_scale(self) -> float:
        return 1 / self.logits_scaling
