"""The Qwen2 family: LLaMA with biases on queries, keys and values; the last layers may have a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from cairn.catalog import Paper, register
from cairn.models.families.windowed import WindowedFamily


@register("architecture", "qwen2", paper=Paper("Qwen2 Technical Report", "arXiv:2407.10671"))
class Qwen2(WindowedFamily):
    """Qwen2 and Qwen2.5: biases on queries, keys and values (section 2.2)."""

    model_type: ClassVar[str] = "qwen2"
    hf_class: ClassVar[str] = "Qwen2ForCausalLM"
    silent: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06,
    }
    norms: ClassVar[Literal["pre", "post", "both"]] = "pre"
    unwritten: ClassVar[frozenset[str]] = frozenset({"mlp_bias", "attention_bias"})
    neutral: ClassVar[dict[str, Any]] = {"mlp_bias": False}

    @property
    def attention_biases(self) -> tuple[bool, bool]:
        return True, False

    def to_hf(self) -> dict[str, Any]:
        return {**super().to_hf(), "use_sliding_window": self.sliding_window is not None, "max_window_layers": self.num_hidden_layers}

    @classmethod
    def _also(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        if not config.get("use_sliding_window"):
            return {"sliding_window": None, "layer_types": None}
        first, layers = config.get("max_window_layers", 28), config.get("num_hidden_layers", cls.model_fields["num_hidden_layers"].default)
        return {"layer_types": config.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]}
