"""The UMT5 family: T5 1.1 whose every layer has biases by distance of its own."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from cairn.catalog import Paper, register
from cairn.models.families.t5 import T5
from cairn.options import Count


@register(
    "architecture", "umt5", paper=Paper("UniMax: Fairer and more Effective Language Sampling for Large-Scale Multilingual Pretraining", "arXiv:2304.09151")
)
class UMT5(T5):
    """UMT5: T5 1.1 with biases by distance of its own in every layer."""

    model_type: ClassVar[str] = "umt5"
    hf_class: ClassVar[str] = "UMT5ForConditionalGeneration"
    per_layer_bias: ClassVar[bool] = True

    vocab_size: Count = Field(250112, ge=1)
    d_ff: Count = Field(1024, ge=1)
    num_layers: int = Field(8, ge=1)
    num_heads: int = Field(6, ge=1)
    feed_forward_proj: Literal["relu", "gated-gelu", "gated-silu"] = "gated-gelu"
