"""The one encoder-decoder behind the T5 families: an encoder reads, a decoder says what follows, looking back at what was read.

Parameter names are Hugging Face's. Attention is not scaled, and has learned biases by distance instead of positions
("Exploring the Limits of Transfer Learning", 1910.10683, section 2.1). As in `decoder`, every module touches only its own parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cairn.models import masks
from cairn.models.decoder import Cache, Head, LanguageModel, Output, RMSNorm, answer
from cairn.models.kernels.linear import Linear, together

KeysAndValues = tuple[Tensor, Tensor]
"""(B, H, E, d_kv) each: what a layer of the decoder sees of what was read."""


def gelu(x: Tensor) -> Tensor:
    """GELU by tanh ("Gaussian Error Linear Units", 1606.08415, section 2); in a lower precision step by step, as transformers rounds it."""
    if x.dtype.itemsize >= 4:
        return F.gelu(x, approximate="tanh")
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": gelu, "silu": F.silu}


def buckets(distances: Tensor, count: int, furthest: int, *, both_ways: bool) -> Tensor:
    """The bucket of each distance key - query (int64): near distances have one each, further ones share, logarithmically, and all from
    `furthest` on are in the last. `both_ways` gives half of the `count` buckets to what follows; else it counts as distance 0."""
    if both_ways:
        half = count // 2
        return half * (distances > 0) + _one_sided(distances.abs(), half, furthest)
    return _one_sided((-distances).clamp(min=0), count, furthest)


def _one_sided(distances: Tensor, count: int, furthest: int) -> Tensor:
    near = count // 2
    steps = torch.log(distances.clamp(min=1).float() / near) / math.log(furthest / near) * (count - near)
    return torch.where(distances < near, distances, (near + steps.to(torch.int64)).clamp(max=count - 1))


class EncoderDecoderSizes(Protocol):
    """What the encoder-decoder asks of a family; the names are those of transformers' T5."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def d_kv(self) -> int: ...
    @property
    def d_ff(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def relative_attention_num_buckets(self) -> int: ...
    @property
    def relative_attention_max_distance(self) -> int: ...
    @property
    def layer_norm_epsilon(self) -> float: ...

    @property
    def per_layer_bias(self) -> bool: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def gated(self) -> bool: ...
    @property
    def activation(self) -> str: ...
    @property
    def scaled(self) -> bool: ...


class BiasedAttention(nn.Module):
    """Unscaled attention of x (B, T, D) over itself or over given keys and values, with a bias by distance where it has one of its own."""

    def __init__(self, a: EncoderDecoderSizes, layer: int, *, biased: bool, both_ways: bool) -> None:
        super().__init__()
        self.layer, self.head_size, self.furthest, self.both_ways = layer, a.d_kv, a.relative_attention_max_distance, both_ways
        inner = a.num_heads * a.d_kv
        self.q = Linear(a.d_model, inner, bias=False)
        self.k = Linear(a.d_model, inner, bias=False)
        self.v = Linear(a.d_model, inner, bias=False)
        self.o = Linear(inner, a.d_model, bias=False)
        if biased:
            self.relative_attention_bias = nn.Embedding(a.relative_attention_num_buckets, a.num_heads)

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, H * d_kv) to (B, H, T, d_kv)."""
        return x.view(*x.shape[:-1], -1, self.head_size).transpose(1, 2)

    def seen(self, x: Tensor) -> KeysAndValues:
        """Keys and values of x (B, T, D)."""
        k, v = map(self.heads, together(x, self.k, self.v))
        return k, v

    def bias(self, queries: int, keys: int) -> Tensor:
        """(1, H, queries, keys); the last query stands at the last key."""
        device = self.q.weight.device
        distances = torch.arange(keys, device=device) - torch.arange(keys - queries, keys, device=device)[:, None]
        table = self.relative_attention_bias
        return table(buckets(distances, table.num_embeddings, self.furthest, both_ways=self.both_ways)).permute(2, 0, 1)[None]

    def forward(self, x: Tensor, plan: masks.MaskPlan, seen: KeysAndValues | None = None, cache: Cache | None = None) -> tuple[Tensor, masks.MaskPlan]:
        """The output, and the plan with the bias in it, for layers that share one."""
        if seen is None:
            q, k, v = map(self.heads, together(x, self.q, self.k, self.v))
        else:
            q, (k, v) = self.heads(self.q(x)), seen
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        if hasattr(self, "relative_attention_bias"):
            plan = masks.biased(plan, self.bias(q.shape[2], k.shape[2]))
        if plan.dense is not None and plan.dense.is_floating_point():
            plan = masks.MaskPlan(dense=plan.dense.to(q.dtype))
        return self.o(masks.attend(q, k, v, plan, scale=1.0).transpose(1, 2).flatten(2)), plan


class SelfAttention(nn.Module):
    """x + attention(norm(x))."""

    def __init__(self, a: EncoderDecoderSizes, layer: int, *, decoder: bool) -> None:
        super().__init__()
        self.SelfAttention = BiasedAttention(a, layer, biased=a.per_layer_bias or layer == 0, both_ways=not decoder)
        self.layer_norm = RMSNorm(a.d_model, a.layer_norm_epsilon, rounds_first=True)

    def forward(self, x: Tensor, plan: masks.MaskPlan, cache: Cache | None = None) -> tuple[Tensor, masks.MaskPlan]:
        found, plan = self.SelfAttention(self.layer_norm(x), plan, None, cache)
        return x + found, plan


class CrossAttention(nn.Module):
    """x + attention of norm(x) over what was read."""

    def __init__(self, a: EncoderDecoderSizes, layer: int) -> None:
        super().__init__()
        self.EncDecAttention = BiasedAttention(a, layer, biased=False, both_ways=True)
        self.layer_norm = RMSNorm(a.d_model, a.layer_norm_epsilon, rounds_first=True)

    def forward(self, x: Tensor, plan: masks.MaskPlan, read: Tensor | KeysAndValues) -> Tensor:
        seen = self.EncDecAttention.seen(read) if isinstance(read, Tensor) else read
        return x + self.EncDecAttention(self.layer_norm(x), plan, seen)[0]


class FeedForward(nn.Module):
    """One activated matrix (T5), or one that another one gates (T5 1.1: "GLU Variants Improve Transformer", 2002.05202), and a way back."""

    def __init__(self, a: EncoderDecoderSizes) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[a.activation]
        self.inward = ("wi_0", "wi_1") if a.gated else ("wi",)
        for name in self.inward:
            self.add_module(name, Linear(a.d_model, a.d_ff, bias=False))
        self.wo = Linear(a.d_ff, a.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first, *gated = (self.get_submodule(name)(x) for name in self.inward)
        inner = self.activation(first)
        return self.wo(inner * gated[0] if gated else inner)


class DenseMLP(nn.Module):
    """x + feed_forward(norm(x))."""

    def __init__(self, a: EncoderDecoderSizes) -> None:
        super().__init__()
        self.DenseReluDense = FeedForward(a)
        self.layer_norm = RMSNorm(a.d_model, a.layer_norm_epsilon, rounds_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nn.Module):
    """Self-attention, cross-attention in a decoder, MLP."""

    def __init__(self, a: EncoderDecoderSizes, layer: int, *, decoder: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([SelfAttention(a, layer, decoder=decoder), *([CrossAttention(a, layer)] if decoder else []), DenseMLP(a)])

    def forward(
        self,
        x: Tensor,
        plan: masks.MaskPlan,
        cross: masks.MaskPlan | None = None,
        read: Tensor | KeysAndValues | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, masks.MaskPlan]:
        x, plan = self.layer[0](x, plan, cache)
        if read is not None:
            x = self.layer[1](x, cross, read)
        return self.layer[-1](x), plan


class T5Stack(nn.Module):
    """Blocks and a final norm. Where the layers share a bias, the first one hands its plan on."""

    def __init__(self, a: EncoderDecoderSizes, layers: int, *, decoder: bool) -> None:
        super().__init__()
        self.per_layer = a.per_layer_bias
        self.block = nn.ModuleList(Block(a, layer, decoder=decoder) for layer in range(layers))
        self.final_layer_norm = RMSNorm(a.d_model, a.layer_norm_epsilon, rounds_first=True)

    def forward(
        self,
        x: Tensor,
        plan: masks.MaskPlan,
        cross: masks.MaskPlan | None = None,
        read: Tensor | Sequence[KeysAndValues] | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        for layer, block in enumerate(self.block):
            seen = read if read is None or isinstance(read, Tensor) else read[layer]
            x, used = block(x, plan, cross, seen, cache)
            plan = plan if self.per_layer else used
        return self.final_layer_norm(x)


class EncoderDecoder(LanguageModel):
    """A sequence-to-sequence model of the T5 families; see `T5.build`."""

    embedding = "shared"

    def __init__(self, architecture: EncoderDecoderSizes) -> None:
        super().__init__(architecture)
        a = architecture
        self.shared = nn.Embedding(a.vocab_size, a.d_model)
        self.encoder = T5Stack(a, a.num_layers, decoder=False)
        self.decoder = T5Stack(a, a.num_hidden_layers, decoder=True)
        self.lm_head = Head(a)
        self._tie()

    def blocks(self) -> list[nn.Module]:
        return [*self.encoder.block, *self.decoder.block]

    def encode(self, input_ids: Tensor, encoder_mask: masks.Mask | None = None) -> Tensor:
        """What the decoder looks at (B, E, D), of token ids (B, E); every position sees all by default."""
        batch, length = input_ids.shape
        plan = masks.prepare(encoder_mask or masks.full(), batch, length, length, input_ids.device, "sdpa")
        return self.encoder(self.shared(input_ids), plan)

    def remember(self, read: Tensor) -> list[KeysAndValues]:
        """Keys and values of what was read, of every layer of the decoder: computed once for all tokens that are generated."""
        return [block.layer[1].EncDecAttention.seen(read) for block in self.decoder.block]  # type: ignore[index, union-attr]

    def forward(
        self,
        input_ids: Tensor | None,
        *,
        decoder_input_ids: Tensor,
        encoder_mask: masks.Mask | None = None,
        mask: masks.Mask | None = None,
        cross: masks.Mask | None = None,
        read: Tensor | Sequence[KeysAndValues] | None = None,
        cache: Cache | None = None,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        z_loss: float = 0.0,
        each: bool = False,
        logits: Literal["all", "last"] | Tensor | None = None,
    ) -> Output:
        """Logits for what follows `decoder_input_ids` (B, T), or the loss where `targets` (B, T) are given.

        input_ids (B, E) int64, or None where `read` has what `encode` or `remember` made of them; encoder_mask and cross: all by
        default; mask: causal by default; the rest as in `Decoder.forward`.
        """
        batch, length = decoder_input_ids.shape
        if read is None:
            assert input_ids is not None, "an encoder-decoder needs something to read"
            read = self.encode(input_ids, encoder_mask)
        past, device = cache.length if cache is not None else 0, decoder_input_ids.device
        keys = read.shape[1] if isinstance(read, Tensor) else read[0][0].shape[2]
        plan = masks.prepare(mask, batch, length, past + length, device, "sdpa")
        over = masks.prepare(cross or masks.full(), batch, length, keys, device, "sdpa", offset=0)
        hidden = self.decoder(self.shared(decoder_input_ids), plan, over, read, cache)
        if self.architecture.scaled:
            hidden = hidden * self.architecture.d_model**-0.5
        return answer(self.lm_head, hidden, targets, weights, z_loss, logits, each)
