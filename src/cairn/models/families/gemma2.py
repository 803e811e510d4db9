"""The Gemma 2 family: norms around attention and MLP, bounded scores and logits, every other layer with a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from cairn.catalog import Paper, register
from cairn.models.families.windowed import Kind, WindowedFamily


@register("architecture", "gemma2", paper=Paper("Gemma 2: Improving Open Language Models at a Practical Size", "arXiv:2408.00118"))
class Gemma2(WindowedFamily):
    """Gemma 2: both norms, soft-capping, alternating windows, embeddings scaled by sqrt(hidden_size) (section 2)."""

    model_type: ClassVar[str] = "gemma2"
    hf_class: ClassVar[str] = "Gemma2ForCausalLM"
    silent: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
    }
    norms: ClassVar[Literal["pre", "post", "both"]] = "both"
    unit_norms: ClassVar[bool] = True
    gelu: ClassVar[bool] = True
    neutral: ClassVar[dict[str, Any]] = {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "use_bidirectional_attention": False,
        "mlp_bias": False,
    }

    rms_norm_eps: float = Field(1e-6, gt=0)
    head_dim: int | None = Field(256, ge=1)
    tie_word_embeddings: bool = True
    sliding_window: int | None = Field(4096, ge=1)
    query_pre_attn_scalar: int = Field(256, gt=0)
    """Scores are divided by its root."""
    attn_logit_softcapping: float | None = Field(50.0, gt=0)
    final_logit_softcapping: float | None = Field(30.0, gt=0)

    @property
    def attention_cap(self) -> float | None:  # type: ignore[override]
        return self.attn_logit_softcapping

    @property
    def logit_cap(self) -> float | None:  # type: ignore[override]
        return self.final_logit_softcapping

    @property
    def attention_scale(self) -> float:
        return self.query_pre_attn_scalar**-0.5

    @property
    def embedding_scale(self) -> float:
        return self.hidden_size**0.5

    def pattern(self, layer: int) -> Kind:
        return "full_attention" if layer % 2 else "sliding_attention"

    def to_hf(self) -> dict[str, Any]:
        values = super().to_hf()
        del values["hidden_act"]
        return {**values, "hidden_activation": "gelu_pytorch_tanh"}

    @classmethod
    def _also(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        # None is a value of these keys, not a silence.
        return {key: config[key] for key in ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window") if key in config}
