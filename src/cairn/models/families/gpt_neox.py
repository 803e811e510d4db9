"""The GPT-NeoX family, to which Pythia belongs: layer norms, attention and MLP side by side, partly rotated heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from cairn.catalog import Paper, register
from cairn.models.families.gpt import GPTFamily
from cairn.options import Count

if TYPE_CHECKING:
    from cairn.models.gpt import GPTNeoX


@register(
    "architecture",
    "gpt_neox",
    paper=(Paper("GPT-NeoX-20B: An Open-Source Autoregressive Language Model", "arXiv:2204.06745"), Paper("Pythia", "arXiv:2304.01373")),
)
class GPTNeoXFamily(GPTFamily):
    """GPT-NeoX and Pythia: layer norms, parallel residuals, rope on a part of each head."""

    model_type: ClassVar[str] = "gpt_neox"
    hf_class: ClassVar[str] = "GPTNeoXForCausalLM"
    silent: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 50432,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
    }
    neutral: ClassVar[dict[str, Any]] = {"hidden_act": "gelu", "is_decoder": False}

    hidden_size: Count = Field(512, ge=1)
    intermediate_size: Count = Field(2048, ge=1)
    num_hidden_layers: int = Field(6, ge=1)
    num_attention_heads: int = Field(8, ge=1)
    max_position_embeddings: Count = Field(2048, ge=1)
    layer_norm_eps: float = Field(1e-5, gt=0)
    rope_theta: float = Field(10000.0, gt=0)
    partial_rotary_factor: float = Field(0.25, gt=0, le=1)
    """Share of each head that is rotated."""
    use_parallel_residual: bool = True
    attention_bias: bool = True
    tie_word_embeddings: bool = False
    rope_scaling: ClassVar[None] = None

    @model_validator(mode="after")
    def _rotated_in_pairs(self) -> Self:
        if self.rotary_size < 2 or self.rotary_size % 2:
            raise ValueError(f"{self.partial_rotary_factor} of a head of {self.head_size} is {self.rotary_size} numbers; rope needs an even number of them.")
        return self

    @property
    def rotary_size(self) -> int:
        return int(self.head_size * self.partial_rotary_factor)

    @property
    def inner_size(self) -> int:
        return self.intermediate_size

    @property
    def norm_eps(self) -> float:
        return self.layer_norm_eps

    def to_hf(self) -> dict[str, Any]:
        rope = {"rope_type": "default", "rope_theta": self.rope_theta, "partial_rotary_factor": self.partial_rotary_factor}
        older = {"rotary_emb_base": self.rope_theta, "rotary_pct": self.partial_rotary_factor}
        written = {**self.written(), **older, "hidden_act": "gelu", "hidden_dropout": 0.0, "attention_dropout": 0.0, "rope_parameters": rope}
        return dict(sorted(written.items()))

    @classmethod
    def _also(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        cls.refuse_unless(rope.get("rope_type", rope.get("type", "default")), "default", "rope_type")
        theta, share = config.get("rope_theta") or config.get("rotary_emb_base"), config.get("partial_rotary_factor") or config.get("rotary_pct")
        return {"rope_theta": rope.get("rope_theta") or theta or 10000.0, "partial_rotary_factor": rope.get("partial_rotary_factor") or share or 0.25}

    def network(self) -> GPTNeoX:
        from cairn.models.gpt import GPTNeoX

        return GPTNeoX(self)

    def spread(self, name: str) -> float:
        return self.initializer_range
