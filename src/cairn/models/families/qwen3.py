"""The Qwen3 family: no biases, and every head of queries and keys normalised by itself."""

from __future__ import annotations

from typing import ClassVar, Literal

from cairn.catalog import Paper, register
from cairn.models.families.qwen2 import Qwen2


@register("architecture", "qwen3", paper=Paper("Qwen3 Technical Report", "arXiv:2505.09388"))
class Qwen3(Qwen2):
    """Qwen3: normalised heads of queries and keys instead of biases (section 2)."""

    model_type: ClassVar[str] = "qwen3"
    hf_class: ClassVar[str] = "Qwen3ForCausalLM"
    qk_norm: ClassVar[Literal["none", "all", "head"]] = "head"
    unwritten: ClassVar[frozenset[str]] = frozenset({"mlp_bias"})

    @property
    def attention_biases(self) -> tuple[bool, bool]:
        return self.attention_bias, self.attention_bias
