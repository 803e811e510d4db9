"""The decoder behind GPT-2 and GPT-NeoX: layer norms, fused projections, MLPs without a gate; parameter names are Hugging Face's.

As in `decoder`, every module touches only its own parameters, and shapes and control flow depend on the config alone.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cairn.models import masks
from cairn.models.decoder import Angles, Cache, CausalLanguageModel, Head
from cairn.models.kernels.linear import Linear
from cairn.models.rope import Rope, rotate


class GPTSizes(Protocol):
    """What this decoder asks of a family."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def head_size(self) -> int: ...
    @property
    def inner_size(self) -> int: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def max_position_embeddings(self) -> int: ...


class NeoXSizes(GPTSizes, Protocol):
    """What GPT-NeoX adds."""

    @property
    def attention_bias(self) -> bool: ...
    @property
    def use_parallel_residual(self) -> bool: ...
    @property
    def rotary_size(self) -> int: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def rope_scaling(self) -> dict[str, Any] | None: ...


class Conv1D(nn.Module):
    """A linear map whose weight is stored as (inputs, outputs), as GPT-2's files have it; `nf` is transformers' name for its outputs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


class NeoXAttention(nn.Module):
    """Queries, keys and values of a head side by side in one projection; the first part of each head is rotated."""

    def __init__(self, a: NeoXSizes, layer: int) -> None:
        super().__init__()
        self.layer, self.head_size, self.scale = layer, a.head_size, 1 / math.sqrt(a.head_size)
        self.query_key_value = Linear(a.hidden_size, 3 * a.hidden_size, bias=a.attention_bias)
        self.dense = Linear(a.hidden_size, a.hidden_size, bias=a.attention_bias)

    def queries_and_keys(self, x: Tensor, rope: Angles) -> tuple[Tensor, Tensor]:
        """What is compared for x (B, T, D): (B, H, T, hd) each, rotated."""
        q, k, _ = self._parts(x, rope)
        return q, k

    def _parts(self, x: Tensor, rope: Angles) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.query_key_value(x).unflatten(-1, (-1, 3 * self.head_size)).chunk(3, dim=-1)
        return self._rotated(q, rope).transpose(1, 2), self._rotated(k, rope).transpose(1, 2), v.transpose(1, 2)

    def _rotated(self, x: Tensor, rope: Angles) -> Tensor:
        assert rope is not None, "GPT-NeoX rotates in every layer"
        return rotate(x, *rope)

    def forward(self, x: Tensor, rope: Angles, plan: masks.MaskPlan, cache: Cache | None) -> Tensor:
        q, k, v = self._parts(x, rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        return self.dense(masks.attend(q, k, v, plan, self.scale).transpose(1, 2).flatten(2))


class NeoXMLP(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, a: GPTSizes) -> None:
        super().__init__()
        self.dense_h_to_4h = Linear(a.hidden_size, a.inner_size, bias=True)
        self.dense_4h_to_h = Linear(a.inner_size, a.hidden_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x)))


class NeoXBlock(nn.Module):
    """x + attention(norm(x)) + mlp(norm'(x)), or one after the other ("GPT-NeoX-20B", 2204.06745, section 2)."""

    def __init__(self, a: NeoXSizes, layer: int) -> None:
        super().__init__()
        self.parallel = a.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(a.hidden_size, eps=a.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(a.hidden_size, eps=a.norm_eps)
        self.attention = NeoXAttention(a, layer)
        self.mlp = NeoXMLP(a)

    def forward(self, x: Tensor, rope: Angles, plan: masks.MaskPlan, cache: Cache | None = None) -> Tensor:
        after = x + self.attention(self.input_layernorm(x), rope, plan, cache)
        return after + self.mlp(self.post_attention_layernorm(x if self.parallel else after))


class GPT2Attention(nn.Module):
    """Attention over positions that are added to the embedding."""

    def __init__(self, a: GPTSizes, layer: int) -> None:
        super().__init__()
        self.layer, self.head_size, self.scale = layer, a.head_size, 1 / math.sqrt(a.head_size)
        self.c_attn = Conv1D(a.hidden_size, 3 * a.hidden_size)
        self.c_proj = Conv1D(a.hidden_size, a.hidden_size)

    def queries_and_keys(self, x: Tensor, rope: Angles) -> tuple[Tensor, Tensor]:
        """What is compared for x (B, T, D): (B, H, T, hd) each."""
        q, k, _ = self._parts(x)
        return q, k

    def _parts(self, x: Tensor) -> list[Tensor]:
        return [part.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1)]

    def forward(self, x: Tensor, rope: Angles, plan: masks.MaskPlan, cache: Cache | None) -> Tensor:
        q, k, v = self._parts(x)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        return self.c_proj(masks.attend(q, k, v, plan, self.scale).transpose(1, 2).flatten(2))


class GPT2MLP(nn.Module):
    """down(gelu(up(x))) with the tanh form of GELU."""

    def __init__(self, a: GPTSizes) -> None:
        super().__init__()
        self.c_fc = Conv1D(a.hidden_size, a.inner_size)
        self.c_proj = Conv1D(a.inner_size, a.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class GPT2Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) ("Language Models are Unsupervised Multitask Learners", section 2.3)."""

    def __init__(self, a: GPTSizes, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(a.hidden_size, eps=a.norm_eps)
        self.attn = GPT2Attention(a, layer)
        self.ln_2 = nn.LayerNorm(a.hidden_size, eps=a.norm_eps)
        self.mlp = GPT2MLP(a)

    def forward(self, x: Tensor, rope: Angles, plan: masks.MaskPlan, cache: Cache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rope, plan, cache)
        return x + self.mlp(self.ln_2(x))


class NeoXTrunk(nn.Module):
    """Embedding, blocks and final norm: token ids (B, T) to hidden states (B, T, D)."""

    def __init__(self, a: NeoXSizes) -> None:
        super().__init__()
        self.embed_in = nn.Embedding(a.vocab_size, a.hidden_size)
        self.layers = nn.ModuleList(NeoXBlock(a, layer) for layer in range(a.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(a.hidden_size, eps=a.norm_eps)
        self.rope = Rope(a)

    def forward(self, input_ids: Tensor, mask: masks.Mask | None = None, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        batch, length = input_ids.shape
        past = cache.length if cache is not None else 0
        plan = masks.prepare(mask, batch, length, past + length, input_ids.device)
        rope = self.rope(length, past, positions)
        x = self.embed_in(input_ids)
        for layer in self.layers:
            x = layer(x, rope, plan, cache)
        return self.final_layer_norm(x)


class GPT2Trunk(nn.Module):
    """Embeddings of tokens and positions, blocks and final norm: token ids (B, T) to hidden states (B, T, D)."""

    def __init__(self, a: GPTSizes) -> None:
        super().__init__()
        self.wte = nn.Embedding(a.vocab_size, a.hidden_size)
        self.wpe = nn.Embedding(a.max_position_embeddings, a.hidden_size)
        self.h = nn.ModuleList(GPT2Block(a, layer) for layer in range(a.num_hidden_layers))
        self.ln_f = nn.LayerNorm(a.hidden_size, eps=a.norm_eps)

    def forward(self, input_ids: Tensor, mask: masks.Mask | None = None, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        batch, length = input_ids.shape
        past = cache.length if cache is not None else 0
        plan = masks.prepare(mask, batch, length, past + length, input_ids.device)
        where = torch.arange(past, past + length, device=input_ids.device)[None] if positions is None else positions
        x = self.wte(input_ids) + self.wpe(where)
        for block in self.h:
            x = block(x, None, plan, cache)
        return self.ln_f(x)


class GPTDecoder(CausalLanguageModel):
    """A causal language model of the GPT families."""

    def blocks(self) -> list[nn.Module]:
        trunk = getattr(self, self.trunk)
        return list(trunk.layers if isinstance(trunk, NeoXTrunk) else trunk.h)


class GPTNeoX(GPTDecoder):
    """GPT-NeoX and Pythia; see `cairn.models.families.gpt_neox`."""

    embedding, head, trunk = "gpt_neox.embed_in", "embed_out", "gpt_neox"

    def __init__(self, a: NeoXSizes) -> None:
        super().__init__(a)
        self.gpt_neox = NeoXTrunk(a)
        self.embed_out = Head(a)
        self._tie()


class GPT2(GPTDecoder):
    """GPT-2; see `cairn.models.families.gpt2`."""

    embedding, head, trunk = "transformer.wte", "lm_head", "transformer"

    def __init__(self, a: GPTSizes) -> None:
        super().__init__(a)
        self.transformer = GPT2Trunk(a)
        self.lm_head = Head(a)
        self._tie()
