"""The one decoder behind every family: parameter names are Hugging Face's, so a state dict IS the published format.

Parallelism, compilation and precision are applied from outside. What makes that possible: every module touches only
its own parameters, and only in its `forward`; shapes and control flow depend on the config alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cairn.checkpoint.format.parts import local_of, part_of
from cairn.models import masks
from cairn.models.config import Architecture
from cairn.models.kernels import attention
from cairn.models.kernels.linear import Linear, apart, joined, together
from cairn.models.kernels.loss import linear_cross_entropy, linear_token_losses
from cairn.models.rope import Rope, rotate


class Cache(Protocol):
    """What attention needs of a key-value cache; `generate.cache.KeyValueCache` is one."""

    @property
    def length(self) -> int:
        """Tokens held, the same for every layer between forward passes."""

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, Hkv, T, hd) and return everything that layer holds."""


class Output(NamedTuple):
    """Result of a forward pass; parts that were not asked for are None."""

    logits: Tensor | None
    """(B, T, V), (B, 1, V) of the last position, or (N, V) of chosen ones."""
    loss: Tensor | None
    """Scalar: SUM over positions of weights * (nll + z_loss * lse^2)."""
    token_loss: Tensor | None
    """(B, T) negative log-likelihoods, detached unless each was asked for."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 for lower precisions ("RMSNorm", 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        # The gradient of the weight is summed sequence by sequence, and these sums once more: a sequence stays in cache on the way.
        return (normed * self.weight.expand(*x.shape[:-2], 1, -1)).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rope; OLMo 2 normalises queries and keys over all heads together."""

    def __init__(self, a: Architecture, layer: int) -> None:
        super().__init__()
        queries, keys = a.num_attention_heads * a.head_size, a.key_value_heads * a.head_size
        self.layer, self.head_size = layer, a.head_size
        self.q_proj = Linear(a.hidden_size, queries, bias=a.attention_bias)
        self.k_proj = Linear(a.hidden_size, keys, bias=a.attention_bias)
        self.v_proj = Linear(a.hidden_size, keys, bias=a.attention_bias)
        self.o_proj = Linear(queries, a.hidden_size, bias=a.attention_bias)
        self.q_norm = RMSNorm(queries, a.rms_norm_eps) if a.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(keys, a.rms_norm_eps) if a.qk_norm else nn.Identity()

    def queries_and_keys(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What is compared for x (B, T, D): (B, H, T, hd) and (B, Hkv, T, hd), normalised and rotated."""
        q, k = together(x, self.q_proj, self.k_proj)
        return self._compared(q, k, rope)

    def _compared(self, q: Tensor, k: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return rotate(self._heads(self.q_norm(q)), *rope).transpose(1, 2), rotate(self._heads(self.k_norm(k)), *rope).transpose(1, 2)

    def _heads(self, x: Tensor) -> Tensor:
        # The number of heads is left to `view`: under tensor parallelism a rank holds only some of them.
        return x.view(*x.shape[:-1], -1, self.head_size)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], plan: masks.MaskPlan, cache: Cache | None) -> Tensor:
        layers = self.q_proj, self.k_proj, self.v_proj
        wide = joined(x, *layers)
        if wide is not None and cache is None and isinstance(self.q_norm, nn.Identity):
            seen = masks.attend_rotary(wide, self.q_proj.out_features // self.head_size, rope, plan)
            if seen is not None:
                return self.o_proj(seen)
        q, k, v = apart(x, wide, *layers)
        (q, k), v = self._compared(q, k, rope), self._heads(v).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        return self.o_proj(masks.attend(q, k, v, plan).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) ("GLU Variants Improve Transformer", 2002.05202)."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.gate_proj = Linear(a.hidden_size, a.intermediate_size, bias=a.mlp_bias)
        self.up_proj = Linear(a.hidden_size, a.intermediate_size, bias=a.mlp_bias)
        self.down_proj = Linear(a.intermediate_size, a.hidden_size, bias=a.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): LLaMA."""

    def __init__(self, a: Architecture, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(a, layer)
        self.mlp = MLP(a)
        self.input_layernorm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(a.hidden_size, a.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], plan: masks.MaskPlan, cache: Cache | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, plan, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class PostNormBlock(nn.Module):
    """x + norm(attention(x)), then x + norm(mlp(x)): OLMo 2."""

    def __init__(self, a: Architecture, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(a, layer)
        self.mlp = MLP(a)
        self.post_attention_layernorm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(a.hidden_size, a.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], plan: masks.MaskPlan, cache: Cache | None = None) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(x, rope, plan, cache))
        return x + self.post_feedforward_layernorm(self.mlp(x))


_BLOCKS: dict[str, Callable[[Architecture, int], nn.Module]] = {"pre": PreNormBlock, "post": PostNormBlock}


class Trunk(nn.Module):
    """Embedding, blocks and final norm: token ids (B, T) to hidden states (B, T, D)."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(a.vocab_size, a.hidden_size)
        self.layers = nn.ModuleList(_BLOCKS[a.norms](a, layer) for layer in range(a.num_hidden_layers))
        self.norm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.rope = Rope(a)

    def forward(self, input_ids: Tensor, mask: masks.Mask | None = None, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        batch, length = input_ids.shape
        past = cache.length if cache is not None else 0
        plan = masks.prepare(mask, batch, length, past + length, input_ids.device)
        rope = self.rope(length, past, positions)
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, rope, plan, cache)
        return self.norm(x)


class Head(Linear):
    """The matrix to the vocabulary: logits, or directly the loss without ever holding all logits."""

    def __init__(self, a: Any) -> None:
        super().__init__(a.hidden_size, a.vocab_size, bias=False)

    def forward(self, hidden: Tensor, targets: Tensor | None = None, weights: Tensor | None = None, z_loss: float = 0.0, each: bool = False) -> Any:
        """Logits (B, T, V) of hidden (B, T, D); with targets (B, T) the pair of summed loss and token losses (B, T); with `each` no
        sum, and token losses that can be differentiated."""
        if targets is None:
            return super().forward(hidden)
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        if each:
            return None, linear_token_losses(hidden.flatten(0, 1), self.weight, targets.flatten()).view(targets.shape)
        flat = None if weights is None else weights.flatten()
        loss, nll = linear_cross_entropy(hidden.flatten(0, 1), self.weight, targets.flatten(), flat, z_loss)
        return loss, nll.view(targets.shape)


class LanguageModel(nn.Module):
    """What has an architecture, an embedding and a head, which may be one tensor; `embedding` names the former."""

    embedding: str

    def __init__(self, architecture: Any) -> None:
        super().__init__()
        attention.prepare()
        self.architecture: Any = architecture
        self.register_state_dict_post_hook(_name_once)
        self.register_load_state_dict_pre_hook(_name_twice)

    def blocks(self) -> list[nn.Module]:
        """The blocks in the order in which they are passed."""
        raise NotImplementedError

    def _tie(self) -> None:
        if self.architecture.tie_word_embeddings:
            self.lm_head.weight = self.get_submodule(self.embedding).weight  # type: ignore[union-attr]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._tie()  # a move that allocates new parameters would otherwise split what is tied
        return self


class Decoder(LanguageModel):
    """A causal language model of any of our families; see `Architecture.build`."""

    embedding = "model.embed_tokens"

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        self.model = Trunk(architecture)
        self.lm_head = Head(architecture)
        self._tie()

    def blocks(self) -> list[nn.Module]:
        return list(self.model.layers)

    def hidden(self, input_ids: Tensor, *, mask: masks.Mask | None = None, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Final hidden states (B, T, D), after the last norm, of token ids (B, T)."""
        return self.model(input_ids, mask, positions, cache)

    def forward(
        self,
        input_ids: Tensor,
        *,
        mask: masks.Mask | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        z_loss: float = 0.0,
        each: bool = False,
        logits: Literal["all", "last"] | Tensor | None = None,
    ) -> Output:
        """Logits, or the loss where `targets` are given.

        input_ids (B, T) int64; mask: causal by default; positions (B, T) for rope, by default those since the start of
        the cache; targets (B, T) int64 and their weights (B, T) (1 by default; a target of weight 0 may be anything); each: instead
        of the sum, token losses that can be differentiated one by one;
        logits: which to return, by default 'all' without targets and none with them; a tensor (N,) chooses positions b * T + t.
        Returns `Output`.
        """
        return answer(self.lm_head, self.model(input_ids, mask, positions, cache), targets, weights, z_loss, logits, each)


def answer(
    head: Head,
    hidden: Tensor,
    targets: Tensor | None,
    weights: Tensor | None,
    z_loss: float,
    logits: Literal["all", "last"] | Tensor | None,
    each: bool = False,
) -> Output:
    """What a forward pass returns of its hidden states (B, T, D): see `Decoder.forward`."""
    loss = token_loss = scores = None
    if targets is not None:
        loss, token_loss = head(hidden, targets, weights, z_loss, each)
    elif logits is None:
        logits = "all"
    if isinstance(logits, Tensor):
        scores = head(hidden.flatten(0, 1)[logits])
    elif logits is not None:
        scores = head(hidden if logits == "all" else hidden[:, -1:])
    return Output(scores, loss, token_loss)


def _name_once(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A tied head is stored under the embedding's name only, as transformers does."""
    if isinstance(module, LanguageModel) and module.architecture.tie_word_embeddings:
        state.pop(f"{prefix}lm_head.weight", None)


def _name_twice(module: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    if isinstance(module, LanguageModel) and module.architecture.tie_word_embeddings:
        embedding = f"{prefix}{module.embedding}.weight"
        if embedding in state:
            state.setdefault(f"{prefix}lm_head.weight", state[embedding])


@torch.no_grad()
def initialize(model: nn.Module, seed: int, spread: float | Callable[[str], float], cutoff: float | None = None) -> None:
    """Draw every matrix from N(0, spread^2) by its own stream of (seed, name), where `spread` may depend on the name; biases become 0,
    norm weights 1. With a `cutoff` the distribution is truncated at so many spreads: no weight lies further from 0."""
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
            continue
        # A shard takes its part of what one process would draw: the layout does not change the model.
        local, part = local_of(parameter), part_of(name, parameter)
        stream = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(stream, "big"))
        drawn, deviation = torch.empty(parameter.shape, dtype=torch.float32, device="cpu"), spread(name) if callable(spread) else spread
        if cutoff is None:
            drawn.normal_(0.0, deviation, generator=generator)
        else:
            nn.init.trunc_normal_(drawn, 0.0, deviation, -cutoff * deviation, cutoff * deviation, generator=generator)
        local.copy_(drawn[part.slices])
