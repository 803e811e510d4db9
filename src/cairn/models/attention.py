"""Causal attention on a CPU, in blocks of queries that stay in cache.

torch's own CPU kernel multiplies blocks that are too small for the matrix library when heads are narrow. Here a block of
queries of all heads of a sequence meets the keys up to its own end in one batched product: scores never leave the
cache, what a causal mask hides is mostly not computed, and the backward pass computes the probabilities again ("Flash
Attention", 2205.14135, without its tiling of the keys). docs/benchmarks/train_step.md has figures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64
"""Queries in a block."""
SHORTEST, LONGEST = 64, 2048
"""Lengths for which the blocks are worth it; the scores of one block, heads x BLOCK x length, must fit the cache."""


def suits(q: Tensor, k: Tensor) -> bool:
    """Whether these are plain float32 tensors on a CPU, of equal and moderate length."""
    plain = all(type(x) in (Tensor, nn.Parameter) for x in (q, k))
    return plain and q.device.type == "cpu" and q.dtype == k.dtype == torch.float32 and q.shape[2] == k.shape[2] and SHORTEST <= q.shape[2] <= LONGEST


def attend_causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T, causal) v for q (B, H, T, hd) and k, v (B, Hkv, T, hd), to (B, H, T, hd). Differentiable once."""
    return _attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale).transpose(1, 2)


class _Blocks:
    """Scores and probabilities of one sequence after the other, block by block, in buffers that are allocated once."""

    def __init__(self, q: Tensor, k: Tensor, scale: float) -> None:
        self.length, self.heads, self.size = q.shape[1:]
        self.groups, self.scale = k.shape[2], scale
        self.share = self.heads // self.groups
        rows = self.heads * min(BLOCK, self.length)
        self.scores, self.chances = q.new_empty(rows * self.length), q.new_empty(rows * self.length)
        self.future = torch.full((BLOCK, BLOCK), float("-inf"), dtype=q.dtype).triu(1)

    def ranges(self) -> list[tuple[int, int]]:
        return [(first, min(first + BLOCK, self.length)) for first in range(0, self.length, BLOCK)]

    def rows(self, x: Tensor, first: int, last: int) -> Tensor:
        """Of x (T, H, hd) the block's rows by key head: (Hkv, share * n, hd)."""
        return x[first:last].transpose(0, 1).reshape(self.groups, self.share * (last - first), self.size)

    def buffer(self, flat: Tensor, first: int, last: int) -> Tensor:
        """(Hkv, share * n, last) in a shared buffer."""
        rows = self.share * (last - first)
        return flat[: self.groups * rows * last].view(self.groups, rows, last)

    def probabilities(self, q: Tensor, keys: Tensor, first: int, last: int) -> Tensor:
        """Of scaled queries (Hkv, share * n, hd) over the keys (Hkv, T, hd) up to `last`: (Hkv, share * n, last)."""
        scores, chances = self.buffer(self.scores, first, last), self.buffer(self.chances, first, last)
        torch.bmm(q, keys[:, :last].transpose(1, 2), out=scores)
        own = scores.view(self.groups, self.share, last - first, last)[..., first:]
        own += self.future[: last - first, : last - first]
        return torch.softmax(scores, -1, out=chances)

    def put(self, target: Tensor, value: Tensor, first: int, last: int) -> None:
        """Write (Hkv, share * n, hd) back into rows of target (T, H, hd)."""
        target[first:last] = value.view(self.heads, last - first, self.size).transpose(0, 1)


@torch.library.custom_op("cairn::causal_attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q (B, T, H, hd), k and v (B, T, Hkv, hd), to (B, T, H, hd)."""
    blocks, out = _Blocks(q, k, scale), q.new_empty(q.shape)
    for queries, keys, values, result in zip(q, k, v, out, strict=True):
        scaled, keys, values = queries * scale, keys.transpose(0, 1), values.transpose(0, 1)
        for first, last in blocks.ranges():
            chances = blocks.probabilities(blocks.rows(scaled, first, last), keys, first, last)
            blocks.put(result, torch.bmm(chances, values[:, :last]), first, last)
    return out


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("cairn::causal_attention_backward", mutates_args=())
def _backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    blocks = _Blocks(q, k, scale)
    errors = torch.empty_like(blocks.scores)
    for_q, for_k, for_v = (x.new_empty(x.shape) for x in (q, k, v))
    sums = [q.new_empty((blocks.groups, blocks.length, blocks.size)) for _ in range(2)]
    for b in range(len(q)):
        scaled, keys, values = q[b] * scale, k[b].transpose(0, 1), v[b].transpose(0, 1)
        inner = (gradient[b] * out[b]).sum(-1, keepdim=True)
        sum_k, sum_v = (x.zero_() for x in sums)
        for first, last in blocks.ranges():
            rows, upstream = blocks.rows(scaled, first, last), blocks.rows(gradient[b], first, last)
            chances = blocks.probabilities(rows, keys, first, last)
            sum_v[:, :last].baddbmm_(chances.transpose(1, 2), upstream)
            error = blocks.buffer(errors, first, last)
            torch.bmm(upstream, values[:, :last].transpose(1, 2), out=error)
            error -= inner[first:last].transpose(0, 1).reshape(blocks.groups, -1, 1)
            error *= chances
            blocks.put(for_q[b], torch.bmm(error, keys[:, :last]).mul_(scale), first, last)
            sum_k[:, :last].baddbmm_(error.transpose(1, 2), rows)
        for_k[b], for_v[b] = sum_k.transpose(0, 1), sum_v.transpose(0, 1)
    return for_q, for_k, for_v


@_backward.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.scale = inputs[3]
    ctx.save_for_backward(*inputs[:3], output)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(gradient, *ctx.saved_tensors, ctx.scale), None)


_attend.register_autograd(_gradients, setup_context=_keep)
