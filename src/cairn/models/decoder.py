"""The one decoder behind every family: parameter names are Hugging Face's, so a state dict IS the published format.

Parallelism, compilation and precision are applied from outside. What makes that possible: every module touches only
its own parameters, and only in its `forward`; shapes and control flow depend on the config alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cairn.checkpoint.format.parts import local_of, part_of
from cairn.models import masks
from cairn.models.config import Architecture
from cairn.models.experts import MixtureOfExperts
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
    """x / rms(x) * weight over the last dimension, in float32 for lower precisions ("RMSNorm", 1910.07467); with `unit` times 1 + weight.

    Kept in a lower precision, some families round before the product with the weight (`rounds_first`), others behind it: as transformers.
    """

    def __init__(self, size: int, eps: float, unit: bool = False, *, rounds_first: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if unit else torch.ones(size))
        self.eps, self.unit, self.rounds_first = eps, unit, rounds_first

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.unit:
            return (normed * (1.0 + self.weight.to(normed.dtype)).expand(*x.shape[:-2], 1, -1)).to(x.dtype)
        if self.rounds_first and self.weight.dtype == x.dtype:
            normed = normed.to(x.dtype)
        # The gradient of the weight is summed sequence by sequence, and these sums once more: a sequence stays in cache on the way.
        return (normed * self.weight.expand(*x.shape[:-2], 1, -1)).to(x.dtype)


def _norm(a: Architecture, size: int) -> RMSNorm:
    return RMSNorm(size, a.rms_norm_eps, a.unit_norms, rounds_first=a.rounds_early)


Angles = tuple[Tensor, Tensor] | None
"""Cosine and sine of positions; None where a layer does not turn queries and keys."""


class Attention(nn.Module):
    """Grouped-query attention with rope; queries and keys may be normalised, over all heads together or each head by itself."""

    def __init__(self, a: Architecture, layer: int) -> None:
        super().__init__()
        queries, keys = a.num_attention_heads * a.head_size, a.key_value_heads * a.head_size
        into, out = a.attention_biases
        self.layer, self.head_size, self.scale, self.cap, self.each_head = layer, a.head_size, a.attention_scale, a.attention_cap, a.qk_norm == "head"
        self.fused, self.sizes = a.fused, (queries, keys, keys)
        if self.fused:
            self.qkv_proj = Linear(a.hidden_size, sum(self.sizes), bias=into)
        else:
            self.q_proj = Linear(a.hidden_size, queries, bias=into)
            self.k_proj = Linear(a.hidden_size, keys, bias=into)
            self.v_proj = Linear(a.hidden_size, keys, bias=into)
        self.o_proj = Linear(queries, a.hidden_size, bias=out)
        self.q_norm = nn.Identity() if a.qk_norm == "none" else _norm(a, a.head_size if self.each_head else queries)
        self.k_norm = nn.Identity() if a.qk_norm == "none" else _norm(a, a.head_size if self.each_head else keys)
        self.plain = a.qk_norm == "none" and self.cap is None and self.scale == 1 / math.sqrt(self.head_size) and a.rotary_size == a.head_size
        """Whether the kernel that turns queries and keys by itself computes this attention."""

    def queries_and_keys(self, x: Tensor, rope: Angles) -> tuple[Tensor, Tensor]:
        """What is compared for x (B, T, D): (B, H, T, hd) and (B, Hkv, T, hd), normalised and rotated."""
        q, k = self.qkv_proj(x).split(self.sizes, -1)[:2] if self.fused else together(x, self.q_proj, self.k_proj)
        return self._compared(q, self.q_norm, rope), self._compared(k, self.k_norm, rope)

    def _compared(self, x: Tensor, norm: nn.Module, rope: Angles) -> Tensor:
        heads = norm(self._heads(x)) if self.each_head else self._heads(norm(x))
        return (heads if rope is None else rotate(heads, *rope)).transpose(1, 2)

    def _heads(self, x: Tensor) -> Tensor:
        # The number of heads is left to `view`: under tensor parallelism a rank holds only some of them.
        return x.view(*x.shape[:-1], -1, self.head_size)

    def forward(self, x: Tensor, rope: Angles, plan: masks.MaskPlan, cache: Cache | None) -> Tensor:
        layers = () if self.fused else (self.q_proj, self.k_proj, self.v_proj)
        wide = self.qkv_proj(x) if self.fused else joined(x, *layers)
        if wide is not None and cache is None and self.plain and rope is not None:
            seen = masks.attend_rotary(wide, self.sizes[0] // self.head_size, rope, plan)
            if seen is not None:
                return self.o_proj(seen)
        q, k, v = wide.split(self.sizes, -1) if self.fused and wide is not None else apart(x, wide, *layers)
        q, k, v = self._compared(q, self.q_norm, rope), self._compared(k, self.k_norm, rope), self._heads(v).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        return self.o_proj(masks.attend(q, k, v, plan, self.scale, self.cap).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), or gated by GELU ("GLU Variants Improve Transformer", 2002.05202)."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.gelu, self.fused = a.gelu, a.fused
        if self.fused:
            self.gate_up_proj = Linear(a.hidden_size, 2 * a.intermediate_size, bias=a.mlp_bias)
        else:
            self.gate_proj = Linear(a.hidden_size, a.intermediate_size, bias=a.mlp_bias)
            self.up_proj = Linear(a.hidden_size, a.intermediate_size, bias=a.mlp_bias)
        self.down_proj = Linear(a.intermediate_size, a.hidden_size, bias=a.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1) if self.fused else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj((F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate)) * up)


def _mlp(a: Architecture, layer: int) -> nn.Module:
    """What a block has behind its attention: one MLP, or a choice of experts for each token."""
    experts = a.experts_of(layer)
    return MLP(a) if experts is None else MixtureOfExperts(a.hidden_size, experts)


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): LLaMA."""

    def __init__(self, a: Architecture, layer: int) -> None:
        super().__init__()
        self.scale, self.mlp_name = a.residual_scale, a.mlp_name
        self.self_attn = Attention(a, layer)
        self.add_module(self.mlp_name, _mlp(a, layer))
        self.input_layernorm = _norm(a, a.hidden_size)
        self.post_attention_layernorm = _norm(a, a.hidden_size)

    def forward(self, x: Tensor, rope: Angles, plan: masks.MaskPlan, cache: Cache | None = None) -> Tensor:
        x = x + _scaled(self.self_attn(self.input_layernorm(x), rope, plan, cache), self.scale)
        return x + _scaled(self.get_submodule(self.mlp_name)(self.post_attention_layernorm(x)), self.scale)


class PostNormBlock(nn.Module):
    """x + norm(attention(x)), then x + norm(mlp(x)): OLMo 2."""

    def __init__(self, a: Architecture, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(a, layer)
        self.mlp = MLP(a)
        self.post_attention_layernorm = _norm(a, a.hidden_size)
        self.post_feedforward_layernorm = _norm(a, a.hidden_size)

    def forward(self, x: Tensor, rope: Angles, plan: masks.MaskPlan, cache: Cache | None = None) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(x, rope, plan, cache))
        return x + self.post_feedforward_layernorm(self.mlp(x))


class BothNormsBlock(nn.Module):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))): Gemma 2."""

    def __init__(self, a: Architecture, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(a, layer)
        self.mlp = MLP(a)
        self.input_layernorm = _norm(a, a.hidden_size)
        self.post_attention_layernorm = _norm(a, a.hidden_size)
        self.pre_feedforward_layernorm = _norm(a, a.hidden_size)
        self.post_feedforward_layernorm = _norm(a, a.hidden_size)

    def forward(self, x: Tensor, rope: Angles, plan: masks.MaskPlan, cache: Cache | None = None) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rope, plan, cache))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


_BLOCKS: dict[str, Callable[[Architecture, int], nn.Module]] = {"pre": PreNormBlock, "post": PostNormBlock, "both": BothNormsBlock}


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x * factor


class Trunk(nn.Module):
    """Embedding, blocks and final norm: token ids (B, T) to hidden states (B, T, D)."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(a.vocab_size, a.hidden_size)
        self.layers = nn.ModuleList(_BLOCKS[a.norms](a, layer) for layer in range(a.num_hidden_layers))
        self.norm = _norm(a, a.hidden_size)
        self.windows, self.rotaries = a.windows, [a.rotary_of(layer) for layer in range(a.num_hidden_layers)]
        self.rope = Rope(a)
        self.local_rope = Rope(a.local_rotary()) if "local" in self.rotaries else None
        self.scale, self.backend = a.embedding_scale, "sdpa" if a.attention_cap is not None else None
        self.rounds_early = a.rounds_early
        lower = (torch.bfloat16, torch.float16) if a.unit_norms else ()
        self.rounded = {dtype: torch.tensor(self.scale, dtype=dtype, device="cpu").item() for dtype in lower}

    def forward(self, input_ids: Tensor, mask: masks.Mask | None = None, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        batch, length = input_ids.shape
        past = cache.length if cache is not None else 0
        plans: dict[int | None, masks.MaskPlan] = {}
        for window in {None, *self.windows}:
            # A window as long as all that there is to see is none.
            seen = mask if window is None or window >= past + length else masks.windowed(mask, window)
            plans[window] = masks.prepare(seen, batch, length, past + length, input_ids.device, self.backend)
        ropes: dict[str, Angles] = {"none": None, "global": self.rope(length, past, positions)}
        if self.local_rope is not None:
            ropes["local"] = self.local_rope(length, past, positions)
        x = self.embed_tokens(input_ids)
        x = _scaled(x, self.rounded.get(x.dtype, self.scale))
        if self.rounds_early and x.dtype.itemsize < 4:
            ropes = {kind: None if each is None else (each[0].to(x.dtype), each[1].to(x.dtype)) for kind, each in ropes.items()}
        for layer, window, rotary in zip(self.layers, self.windows, self.rotaries, strict=True):
            x = layer(x, ropes[rotary], plans[window], cache)
        return self.norm(x)


class Head(Linear):
    """The matrix to the vocabulary: logits, or directly the loss without ever holding all logits."""

    def __init__(self, a: Any) -> None:
        super().__init__(a.hidden_size, a.vocab_size, bias=False)
        self.scale, self.cap = getattr(a, "logit_scale", 1.0), getattr(a, "logit_cap", None)

    def forward(self, hidden: Tensor, targets: Tensor | None = None, weights: Tensor | None = None, z_loss: float = 0.0, each: bool = False) -> Any:
        """Logits (B, T, V) of hidden (B, T, D); with targets (B, T) the pair of summed loss and token losses (B, T); with `each` no
        sum, and token losses that can be differentiated."""
        hidden = _scaled(hidden, self.scale)
        if targets is None:
            logits = super().forward(hidden)
            return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        if self.cap is not None:
            return _capped_losses(hidden.flatten(0, 1), self.weight, targets, weights, z_loss, each, self.cap)
        if each:
            return None, linear_token_losses(hidden.flatten(0, 1), self.weight, targets.flatten()).view(targets.shape)
        flat = None if weights is None else weights.flatten()
        loss, nll = linear_cross_entropy(hidden.flatten(0, 1), self.weight, targets.flatten(), flat, z_loss)
        return loss, nll.view(targets.shape)


ROWS = 1024
"""Rows of logits that are held at a time where no fused loss serves."""


def _capped_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, z_loss: float, each: bool, cap: float
) -> tuple[Tensor | None, Tensor]:
    """The losses of `Head.forward` for capped logits: a block of rows at a time, computed again in the backward pass."""

    def block(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.tanh(F.linear(hidden, weight).float() / cap) * cap if hidden.dtype != torch.float64 else torch.tanh(F.linear(hidden, weight) / cap) * cap
        lse = logits.logsumexp(-1)
        return lse - logits.gather(-1, targets[:, None])[:, 0], lse

    parts = [
        checkpoint(block, rows, weight, wanted, use_reentrant=False, preserve_rng_state=False)
        for rows, wanted in zip(hidden.split(ROWS), targets.flatten().split(ROWS), strict=True)
    ]
    losses, lse = (torch.cat(column) for column in zip(*parts, strict=True))
    if each:
        return None, losses.view(targets.shape)
    counted = losses + z_loss * lse.square() if z_loss else losses
    return (counted if weights is None else counted * weights.flatten()).sum(), losses.detach().view(targets.shape)


class LanguageModel(nn.Module):
    """What has an architecture, an embedding and a head, which may be one tensor; `embedding` and `head` name them."""

    embedding: ClassVar[str]
    head: ClassVar[str] = "lm_head"

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
            self.get_submodule(self.head).weight = self.get_submodule(self.embedding).weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._tie()  # a move that allocates new parameters would otherwise split what is tied
        return self


class CausalLanguageModel(LanguageModel):
    """A trunk that reads token ids and a head that scores the next one; `trunk` names the module."""

    trunk: ClassVar[str]

    def hidden(self, input_ids: Tensor, *, mask: masks.Mask | None = None, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Final hidden states (B, T, D), after the last norm, of token ids (B, T)."""
        found: Tensor = getattr(self, self.trunk)(input_ids, mask, positions, cache)
        return found

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
        hidden = getattr(self, self.trunk)(input_ids, mask, positions, cache)
        return answer(getattr(self, self.head), hidden, targets, weights, z_loss, logits, each)


class Decoder(CausalLanguageModel):
    """A causal language model of any of our families; see `Architecture.build`."""

    embedding, trunk = "model.embed_tokens", "model"

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        self.model = Trunk(architecture)
        self.lm_head = Head(architecture)
        self._tie()

    def blocks(self) -> list[nn.Module]:
        return list(self.model.layers)


def answer(
    head: Head,
    hidden: Tensor,
    targets: Tensor | None,
    weights: Tensor | None,
    z_loss: float,
    logits: Literal["all", "last"] | Tensor | None,
    each: bool = False,
) -> Output:
    """What a forward pass returns of its hidden states (B, T, D): see `CausalLanguageModel.forward`."""
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
        state.pop(f"{prefix}{module.head}.weight", None)


def _name_twice(module: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    if isinstance(module, LanguageModel) and module.architecture.tie_word_embeddings:
        embedding = f"{prefix}{module.embedding}.weight"
        if embedding in state:
            state.setdefault(f"{prefix}{module.head}.weight", state[embedding])


@torch.no_grad()
def initialize(model: nn.Module, seed: int, spread: float | Callable[[str], float], cutoff: float | None = None) -> None:
    """Draw every matrix from N(0, spread^2) by its own stream of (seed, name), where `spread` may depend on the name; biases become 0,
    norms begin as the identity. With a `cutoff` the distribution is truncated at so many spreads: no weight lies further from 0."""
    zero = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, RMSNorm) and module.unit}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith(".bias") or name in zero else 1.0)
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
