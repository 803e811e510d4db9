"""The OLMo 2 family: like LLaMA, but each block normalises its outputs, and queries and keys are normalised too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from cairn.catalog import Paper, register
from cairn.models.families import DecoderFamily


@register("architecture", "olmo2", paper=Paper("2 OLMo 2 Furious", "arXiv:2501.00656", 6))
class Olmo2(DecoderFamily):
    """OLMo 2: norms after attention and MLP instead of before, and normalised queries and keys (sections 2.2 and 3)."""

    model_type: ClassVar[str] = "olmo2"
    hf_class: ClassVar[str] = "Olmo2ForCausalLM"
    silent: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 50304,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    norms: ClassVar[Literal["pre", "post"]] = "post"
    qk_norm: ClassVar[Literal["none", "all", "head"]] = "all"
    rounds_early: ClassVar[bool] = False
    unwritten: ClassVar[frozenset[str]] = frozenset({"mlp_bias"})

    initializer_cutoff: float | None = Field(3.0, gt=0)

    @field_validator("mlp_bias")
    @classmethod
    def _no_mlp_bias(cls, value: bool) -> bool:
        if value:
            raise ValueError("mlp_bias: an OLMo 2 MLP has no biases.")
        return value
