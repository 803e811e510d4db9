"""The Qwen3 family: no biases, and every head of queries and keys normalised by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from cairn.catalog import Paper, register
from cairn.models.families.qwen2 import Qwen2


@register("architecture", "qwen3", paper=Paper("Qwen3 Technical Report", "arXiv:2505.09388"))
class Qwen3(Qwen2):
    """Qwen3: normalised heads of queries and keys instead of biases (section 2)."""

    model_type: ClassVar[str] = "qwen3"
    hf_class: ClassVar[str] = "Qwen3ForCausalLM"
    silent: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06,
    }
    qk_norm: ClassVar[Literal["none", "all", "head"]] = "head"
    unwritten: ClassVar[frozenset[str]] = frozenset({"mlp_bias"})

    @property
    def attention_biases(self) -> tuple[bool, bool]:
        return self.attention_bias, self.attention_bias
