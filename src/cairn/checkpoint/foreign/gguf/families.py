"""Which family a GGUF file holds, as data: keys of its metadata, names of its tensors, and what was done to them on the way there.

Both directions read the same tables. What llama.cpp computes for an architecture without asking the file (a window of every sixth layer,
say) stands in `fixed`: a config that says otherwise cannot be exported, and one that is imported says exactly that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

Change = Literal["halves", "plus one", "transposed", "heads together"]
"""What a tensor there is of ours: rows of each head in another order, a norm's weight with 1 added, turned over, q k v no longer head by head."""

_SIZES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "head_dim": "attention.key_length",
}
_WINDOW = {"sliding_window": "attention.sliding_window"}

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PRE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_POST = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_HEADS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_TURNED: dict[str, Change] = {"attn_q": "halves", "attn_k": "halves"}


@dataclass(frozen=True)
class Family:
    """One architecture of GGUF files and the family of transformers that it is."""

    architecture: str
    model_type: str
    hf_class: str
    keys: Mapping[str, str]
    """Keys of config.json and the metadata that say the same, without the architecture in front."""
    outer: Mapping[str, str]
    inner: Mapping[str, str]
    """Names of modules there and here, outside of the layers and within one."""
    layer: str = "model.layers"
    changes: Mapping[str, Change] = field(default_factory=dict)
    """What was done to which module; `*norm` stands for all norms."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of keys that the metadata may leave out."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Keys of config.json with the only value that this architecture computes."""
    biases: Mapping[str, str] = field(default_factory=dict)
    """Keys of config.json that say whether there are biases, and the module of the first layer that tells."""
    tied: bool = False
    """Whether config.json is silent about a head of its own unless it says so."""
    windowed: bool = False
    """Whether it is this family, and not another of the same architecture, only where the metadata name a window."""
    experts: Mapping[str, str] = field(default_factory=dict)
    """Names of modules there that hold all experts of a layer, and here of one of them, with {} for its number."""
    looks_back: bool = True
    """Whether llama.cpp computes a window that config.json names."""

    def here(self, name: str) -> str | None:
        """What a tensor there is called here; None where it has no place."""
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
            inner = self.inner.get(match[2])
            return f"{self.layer}.{match[1]}.{inner}.{match[3]}" if inner is not None else None
        module, _, part = name.rpartition(".")
        return f"{self.outer[module]}.{part}" if module in self.outer and part in ("weight", "bias") else None

    def there(self, name: str) -> str | None:
        """What a tensor here is called there; None where it has no place."""
        module, _, part = name.rpartition(".")
        if match := re.fullmatch(rf"{re.escape(self.layer)}\.(\d+)\.(.+)", module):
            inner = next((there for there, here in self.inner.items() if here == match[2]), None)
            return f"blk.{match[1]}.{inner}.{part}" if inner is not None else None
        outer = next((there for there, here in self.outer.items() if here == module), None)
        return f"{outer}.{part}" if outer is not None else None

    def all_here(self, name: str, count: int) -> list[str] | None:
        """What the `count` experts in a tensor there are called here; None for a tensor that holds none."""
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        pattern = self.experts.get(match[2]) if match else None
        return [f"{self.layer}.{match[1]}.{pattern.format(number)}.weight" for number in range(count)] if match and pattern is not None else None

    def expert_there(self, name: str) -> tuple[str, int] | None:
        """The tensor there that holds an expert's tensor here, and its place in it."""
        for there, pattern in self.experts.items():
            inner = re.escape(pattern).replace(r"\{\}", r"(\d+)")
            if match := re.fullmatch(rf"{re.escape(self.layer)}\.(\d+)\.{inner}\.weight", name):
                return f"blk.{match[1]}.{there}.weight", int(match[2])
        return None

    def change(self, name: str) -> Change | None:
        """What was done to the tensor of this name there."""
        module = name.split(".")[-2]
        change = self.changes.get(module) or (self.changes.get("*norm") if module.endswith("norm") else None)
        return None if change == "transposed" and name.endswith(".bias") else change


def _experts(mlp: str, gate: str, up: str, down: str) -> dict[str, str]:
    return {f"ffn_{part}_exps": f"{mlp}.experts.{{}}.{name}" for part, name in (("gate", gate), ("up", up), ("down", down))}


def _decoder(architecture: str, model_type: str, hf_class: str, norms: Mapping[str, str], **more: Any) -> Family:
    return Family(
        architecture,
        model_type,
        hf_class,
        keys={**_SIZES, **more.pop("keys", {})},
        outer=_OUTER,
        inner={**more.pop("inner", _INNER), **norms},
        defaults={"rope_theta": 10000.0, **more.pop("defaults", {})},
        **more,
    )


_GEMMA_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm", **_POST}
_GEMMA_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
_ATTENTION = {there: here for there, here in _INNER.items() if there.startswith("attn")}
_CHOICE = {"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_BIASES = {"attention_bias": "attn_q", "mlp_bias": "ffn_up"}

FAMILIES: tuple[Family, ...] = (
    _decoder(
        "llama",
        "mixtral",
        "MixtralForCausalLM",
        {**_PRE, "ffn_gate_inp": "block_sparse_moe.gate"},
        inner=_ATTENTION,
        changes=_TURNED,
        keys={"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
        fixed={"hidden_act": "silu", "norm_topk_prob": True},
        experts=_experts("block_sparse_moe", "w1", "w3", "w2"),
        looks_back=False,
    ),
    _decoder(
        "qwen3moe",
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {**_PRE, **_HEADS, "ffn_gate_inp": "mlp.gate"},
        inner=_ATTENTION,
        keys={**_CHOICE, "moe_intermediate_size": "expert_feed_forward_length"},
        biases={"attention_bias": "attn_q"},
        fixed={"hidden_act": "silu", "norm_topk_prob": True, "use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        experts=_experts("mlp", "gate_proj", "up_proj", "down_proj"),
    ),
    _decoder(
        "olmoe",
        "olmoe",
        "OlmoeForCausalLM",
        {**_PRE, **_HEADS, "ffn_gate_inp": "mlp.gate"},
        inner=_ATTENTION,
        keys=_CHOICE,
        fixed={"hidden_act": "silu", "norm_topk_prob": False, "attention_bias": False, "clip_qkv": None},
        experts=_experts("mlp", "gate_proj", "up_proj", "down_proj"),
    ),
    _decoder(
        "phi3",
        "phi3",
        "Phi3ForCausalLM",
        _PRE,
        inner={"attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"},
        keys={**_WINDOW, "original_max_position_embeddings": "rope.scaling.original_context_length"},
        defaults={"sliding_window": None, "original_max_position_embeddings": None},
        fixed={"hidden_act": "silu"},
        looks_back=False,
    ),
    _decoder("llama", "llama", "LlamaForCausalLM", _PRE, changes=_TURNED, biases=_BIASES, fixed={"hidden_act": "silu"}),
    _decoder("qwen2", "qwen2", "Qwen2ForCausalLM", _PRE, fixed={"hidden_act": "silu", "use_sliding_window": False}),
    _decoder(
        "qwen3", "qwen3", "Qwen3ForCausalLM", {**_PRE, **_HEADS}, biases={"attention_bias": "attn_q"}, fixed={"hidden_act": "silu", "use_sliding_window": False}
    ),
    _decoder(
        "smollm3",
        "smollm3",
        "SmolLM3ForCausalLM",
        _PRE,
        changes=_TURNED,
        biases=_BIASES,
        fixed={"hidden_act": "silu", "no_rope_layer_interval": 4, "use_sliding_window": False},
    ),
    _decoder(
        "granite",
        "granite",
        "GraniteForCausalLM",
        _PRE,
        changes=_TURNED,
        biases=_BIASES,
        fixed={"hidden_act": "silu"},
        keys={
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "attention_multiplier": "attention.scale",
            "logits_scaling": "logit_scale",
        },
        defaults={"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0},
    ),
    _decoder("olmo2", "olmo3", "Olmo3ForCausalLM", {**_POST, **_HEADS}, keys=_WINDOW, fixed={"hidden_act": "silu", "attention_bias": False}, windowed=True),
    _decoder("olmo2", "olmo2", "Olmo2ForCausalLM", {**_POST, **_HEADS}, fixed={"hidden_act": "silu", "attention_bias": False}),
    _decoder(
        "gemma2",
        "gemma2",
        "Gemma2ForCausalLM",
        _GEMMA_NORMS,
        keys={**_WINDOW, **_GEMMA_CAPS},
        changes={"*norm": "plus one"},
        defaults={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096},
        fixed={"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
        tied=True,
    ),
    _decoder(
        "gemma3",
        "gemma3_text",
        "Gemma3ForCausalLM",
        {**_GEMMA_NORMS, **_HEADS},
        keys={**_WINDOW, "final_logit_softcapping": "final_logit_softcapping"},
        changes={"*norm": "plus one"},
        defaults={"rope_theta": 1000000.0, "sliding_window": 1024, "final_logit_softcapping": None},
        fixed={"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attn_logit_softcapping": None, "rope_local_base_freq": 10000.0},
        tied=True,
    ),
    Family(
        "gpt2",
        "gpt2",
        "GPT2LMHeadModel",
        keys={
            "n_layer": "block_count",
            "n_embd": "embedding_length",
            "n_inner": "feed_forward_length",
            "n_head": "attention.head_count",
            "n_positions": "context_length",
            "layer_norm_epsilon": "attention.layer_norm_epsilon",
        },
        outer={"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f", "output": "lm_head"},
        inner={
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        layer="transformer.h",
        changes=dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), "transposed"),
        fixed={"activation_function": "gelu_new", "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True},
        tied=True,
    ),
    Family(
        "gptneox",
        "gpt_neox",
        "GPTNeoXForCausalLM",
        keys={
            "num_hidden_layers": "block_count",
            "hidden_size": "embedding_length",
            "intermediate_size": "feed_forward_length",
            "num_attention_heads": "attention.head_count",
            "max_position_embeddings": "context_length",
            "layer_norm_eps": "attention.layer_norm_epsilon",
            "use_parallel_residual": "use_parallel_residual",
        },
        outer={"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"},
        inner={
            "attn_norm": "input_layernorm",
            "attn_qkv": "attention.query_key_value",
            "attn_output": "attention.dense",
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
        },
        layer="gpt_neox.layers",
        changes={"attn_qkv": "heads together"},
        defaults={"use_parallel_residual": True},
        fixed={"hidden_act": "gelu", "attention_bias": True},
    ),
)
"""Every architecture that is read and written. Where two families share one, the one with a window stands first."""

ALIKE = {"mistral": "llama"}
"""Families whose networks are those of another one, and are written as it, as long as nothing looks back at a window."""


# -- what was done to tensors ------------------------------------------------------------------------------------------


def undone(change: Change | None, tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """A tensor as it is here from the one there; also of tensors without values. `heads` are those that its rows belong to."""
    if change == "halves":
        # There neighbours (0, 1), (2, 3) ... are rotated, here the two halves of a head.
        return tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    if change == "plus one":
        return tensor - 1
    if change == "transposed":
        return tensor.transpose(0, 1).contiguous()
    if change == "heads together":
        return tensor.reshape(3, heads, tensor.shape[0] // heads // 3, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
    return tensor


def done(change: Change | None, tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The other direction of `undone`."""
    if change == "halves":
        return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    if change == "plus one":
        return tensor + 1
    if change == "transposed":
        return tensor.transpose(0, 1).contiguous()
    if change == "heads together":
        return tensor.reshape(heads, 3, tensor.shape[0] // heads // 3, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
    return tensor


def heads_of(config: Mapping[str, Any], name: str) -> int:
    """The heads that the rows of a tensor there belong to."""
    heads = int(config.get("num_attention_heads") or config.get("n_head") or 1)
    return int(config.get("num_key_value_heads") or heads) if ".attn_k." in name else heads


def shortest(value: Any) -> Any:
    """A number that was kept in 32 bits as people wrote it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
