"""The LLaMA family: pre-norm blocks, rope, SwiGLU, grouped-query attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from cairn.catalog import Paper, register
from cairn.models.families import DecoderFamily


@register(
    "architecture",
    "llama",
    paper=(
        Paper("LLaMA: Open and Efficient Foundation Language Models", "arXiv:2302.13971"),
        Paper("Experience of Training a 1.7B-Parameter LLaMa Model From Scratch", "", 1),
    ),
)
class Llama(DecoderFamily):
    """LLaMA: pre-norm blocks, rope, SwiGLU, grouped-query attention."""

    model_type: ClassVar[str] = "llama"
    hf_class: ClassVar[str] = "LlamaForCausalLM"
    silent: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-06,
    }
    norms: ClassVar[Literal["pre", "post"]] = "pre"
