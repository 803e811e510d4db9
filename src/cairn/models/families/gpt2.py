"""The GPT-2 family: layer norms, learned positions, matrices stored the other way round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from cairn.catalog import Paper, register
from cairn.models.families.gpt import GPTFamily
from cairn.options import Count

if TYPE_CHECKING:
    from cairn.models.gpt import GPT2


@register("architecture", "gpt2", paper=Paper("Language Models are Unsupervised Multitask Learners"))
class GPT2Family(GPTFamily):
    """GPT-2: layer norms, learned positions, no gate in the MLP."""

    model_type: ClassVar[str] = "gpt2"
    hf_class: ClassVar[str] = "GPT2LMHeadModel"
    silent: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 50257,
    }
    neutral: ClassVar[dict[str, Any]] = {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    }

    n_embd: Count = Field(768, ge=1)
    n_layer: int = Field(12, ge=1)
    n_head: int = Field(12, ge=1)
    n_positions: Count = Field(1024, ge=1)
    n_inner: int | None = Field(None, ge=1)
    """Inner size of the MLP; None: 4 * n_embd."""
    layer_norm_epsilon: float = Field(1e-5, gt=0)
    tie_word_embeddings: bool = True
    rope_scaling: ClassVar[None] = None
    attention_bias: ClassVar[bool] = True

    # By the names that other decoders have for the same.

    @property
    def hidden_size(self) -> int:
        return self.n_embd

    @property
    def num_hidden_layers(self) -> int:
        return self.n_layer

    @property
    def num_attention_heads(self) -> int:
        return self.n_head

    @property
    def max_position_embeddings(self) -> int:
        return self.n_positions

    @property
    def inner_size(self) -> int:
        return self.n_inner or 4 * self.n_embd

    @property
    def norm_eps(self) -> float:
        return self.layer_norm_epsilon

    @property
    def position_parameters(self) -> int:
        return self.n_positions * self.n_embd

    def to_hf(self) -> dict[str, Any]:
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return dict(sorted({**self.written(), **dropouts, "activation_function": "gelu_new"}.items()))

    def network(self) -> GPT2:
        from cairn.models.gpt import GPT2

        return GPT2(self)

    def spread(self, name: str) -> float:
        """What ends in the residual stream begins smaller, by the number of layers (section 2.3)."""
        return self.initializer_range / math.sqrt(2 * self.n_layer) if name.endswith("c_proj.weight") else self.initializer_range
