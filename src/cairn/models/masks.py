"""Who may look at whom: the only place that builds attention masks.

A mask is a small description with ONE definition, the predicate `allows(batch, query, key)` over index tensors. The
dense boolean mask of SDPA and the block mask of FlexAttention are both derived from it, so they cannot disagree.
Masks combine with `&` and `|`; a prefix language model over packed documents is `document(ids) & (causal() | prefix(flags))`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cairn.models.kernels import attention

FLEX_ON = {"cuda"}
"""Device types where a compiled model uses FlexAttention for masks that are not plainly causal; otherwise SDPA gets a dense mask.
Without torch.compile FlexAttention would hold all scores."""


class Mask:
    """Base of all masks. Queries and keys are absolute positions in the sequence, from 0."""

    def allows(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether `query` may look at `key` in sequence `batch`: index tensors that broadcast, to a boolean tensor."""
        raise TypeError(f"{type(self).__name__} does not define allows()")

    def __and__(self, other: Mask) -> Mask:
        return Both(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Either(self, other)

    @property
    def is_causal(self) -> bool:
        """True only for the plain causal mask, which attention kernels know by themselves."""
        return False

    def dense(self, batch: int, queries: int, keys: int, offset: int = 0, device: torch.device | str = "cpu") -> Tensor:
        """Boolean (batch, 1, queries, keys), True where attention is allowed; query i stands at position offset + i."""
        b = torch.arange(batch, device=device)[:, None, None]
        q = torch.arange(offset, offset + queries, device=device)[:, None]
        k = torch.arange(keys, device=device)
        return self.allows(b, q, k).broadcast_to(batch, queries, keys)[:, None]


@dataclass(frozen=True, eq=False)
class Causal(Mask):
    """Every position sees itself and what came before."""

    def allows(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query

    @property
    def is_causal(self) -> bool:
        return True


@dataclass(frozen=True, eq=False)
class Full(Mask):
    """Every position sees every position."""

    def allows(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= 0) & (query >= 0)


@dataclass(frozen=True, eq=False)
class Same(Mask):
    """A query sees the keys that bear its own number: `queries` (B, Tq) and `keys` (B, Tk) hold e.g. document numbers."""

    queries: Tensor
    keys: Tensor

    def allows(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return self.queries[batch, query] == self.keys[batch, key]


@dataclass(frozen=True, eq=False)
class Keys(Mask):
    """Only keys flagged in `flags` (B, Tk) may be seen: padding is left out, or a prefix is opened."""

    flags: Tensor

    def allows(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return self.flags[batch, key] & (query >= 0)


@dataclass(frozen=True, eq=False)
class Before(Mask):
    """The first `lengths[b]` keys of sequence b may be seen by everyone."""

    lengths: Tensor

    def allows(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key < self.lengths[batch]) & (query >= 0)


@dataclass(frozen=True, eq=False)
class Branches(Mask):
    """Every position sees itself and its ancestors: `ends` (B, T) is the end of the subtree of each position, in depth-first order."""

    ends: Tensor

    def allows(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < self.ends[batch, key])


@dataclass(frozen=True, eq=False)
class Window(Mask):
    """A query sees no key that stands `size` or more positions before it."""

    size: int

    def allows(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query - key < self.size


@dataclass(frozen=True, eq=False)
class Both(Mask):
    """What both masks allow."""

    left: Mask
    right: Mask

    def allows(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return self.left.allows(batch, query, key) & self.right.allows(batch, query, key)


@dataclass(frozen=True, eq=False)
class Either(Mask):
    """What at least one of two masks allows."""

    left: Mask
    right: Mask

    def allows(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return self.left.allows(batch, query, key) | self.right.allows(batch, query, key)


def causal() -> Mask:
    """Each position sees itself and the past."""
    return Causal()


def full() -> Mask:
    """Each position sees all (an encoder)."""
    return Full()


def document(ids: Tensor, *, within: Mask | None = None) -> Mask:
    """Attention stays inside a document: `ids` (B, T) numbers the document of each position. `within` is causal by default."""
    return Both(within or Causal(), Same(ids, ids))


def prefix(prefix: Tensor) -> Mask:
    """A prefix language model: causal, but the prefix is seen by all. `prefix`: lengths (B,), or flags (B, T) where packed
    documents have a prefix each (then combine with `document`). ("Exploring the Limits of Transfer Learning", section 3.2.1)"""
    return Either(Causal(), Keys(prefix) if prefix.ndim == 2 else Before(prefix))


def packed_prefix(ids: Tensor, flags: Tensor) -> Mask:
    """Packed documents `ids` (B, T), each with a bidirectional prefix flagged in `flags` (B, T)."""
    return document(ids, within=prefix(flags))


def windowed(mask: Mask | None, size: int) -> Mask:
    """What `mask` (causal by default) allows, no further back than `size` positions, the own one included."""
    return Both(mask or Causal(), Window(size))


def tree(ends: Tensor) -> Mask:
    """Texts that share beginnings, laid out as trees in depth-first order: position k's subtree is k..ends[k] - 1 (`ends` (B, T)).
    Several trees may stand in one row; padding is a tree of one position."""
    return Branches(ends)


def padded(valid: Tensor, *, within: Mask | None = None) -> Mask:
    """Positions where `valid` (B, T) is False are seen by nobody; `within` is causal by default."""
    return Both(within or Causal(), Keys(valid))


def cross(key_valid: Tensor, query_ids: Tensor | None = None, key_ids: Tensor | None = None) -> Mask:
    """Decoder to encoder: every query sees the valid keys (B, Tk); with `query_ids` (B, Tq) and `key_ids` (B, Tk), only
    those of its own example, for packed pairs."""
    mask: Mask = Keys(key_valid)
    return mask if query_ids is None or key_ids is None else Both(mask, Same(query_ids, key_ids))


@dataclass(frozen=True, eq=False)
class MaskPlan:
    """A mask made ready for one forward pass, shared by all its layers: kernel flag, dense mask (boolean, or to be added), or block mask."""

    is_causal: bool = False
    dense: Tensor | None = None
    block: Any = None


def prepare(mask: Mask | None, batch: int, queries: int, keys: int, device: torch.device, backend: str | None = None, offset: int | None = None) -> MaskPlan:
    """Compute what attention needs once per forward pass. None is causal; the first query stands at position `offset`, by default so
    that the last one stands at the last key.

    `backend`: 'sdpa' or 'flex'; None takes FlexAttention in compiled models on CUDA, SDPA everywhere else.
    """
    mask = mask or Causal()
    if mask.is_causal and queries == keys:
        return MaskPlan(is_causal=True)
    if (mask.is_causal and queries == 1) or isinstance(mask, Full):
        return MaskPlan()
    if backend is None:
        flexible = torch.compiler.is_compiling() and device.type in FLEX_ON
        backend = "flex" if flexible and queries == keys and queries % 128 == 0 else "sdpa"
    if backend == "flex":
        return MaskPlan(block=_block_mask(mask, batch, queries, keys, device))
    return MaskPlan(dense=mask.dense(batch, queries, keys, keys - queries if offset is None else offset, device))


def biased(plan: MaskPlan, bias: Tensor) -> MaskPlan:
    """A prepared mask with numbers added to the scores: `bias` (1 or B, H, Tq, Tk)."""
    allowed = plan.dense
    if plan.is_causal:
        allowed = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
    return MaskPlan(dense=bias if allowed is None else bias.masked_fill(~allowed, float("-inf")))


def _block_mask(mask: Mask, batch: int, queries: int, keys: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    offset = keys - queries

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask.allows(b, q + offset, k)

    return create_block_mask(allowed, batch, None, queries, keys, device=str(device))


def attend(q: Tensor, k: Tensor, v: Tensor, plan: MaskPlan, scale: float | None = None, cap: float | None = None) -> Tensor:
    """Attention of q (B, H, Tq, hd) over k, v (B, Hkv, Tk, hd) under a prepared mask, to (B, H, Tq, hd).

    H is a multiple of Hkv; query head i reads key head i // (H / Hkv). `scale` is 1/sqrt(hd) by default. With a `cap` c scores s become
    c * tanh(s / c) ("Gemma 2", 2408.00118, section 2), and all of them are held.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if cap is not None:
        return _capped(q, k, v, plan, scale, cap)
    grouped = q.shape[1] != k.shape[1]
    if plan.block is not None:
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(q, k, v, block_mask=plan.block, scale=scale, enable_gqa=grouped)  # type: ignore[return-value]
    if attention.suits(q, k, v, plan.dense):
        return attention.attention(q, k, v, plan.dense, plan.is_causal, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=plan.dense, is_causal=plan.is_causal, scale=scale, enable_gqa=grouped)


def _capped(q: Tensor, k: Tensor, v: Tensor, plan: MaskPlan, scale: float, cap: float) -> Tensor:
    batch, heads, queries, _ = q.shape
    groups = q.unflatten(1, (k.shape[1], heads // k.shape[1]))
    scores = torch.tanh((groups @ k[:, :, None].mT) * scale / cap) * cap
    allowed = plan.dense
    if plan.is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()[None, None]
    if allowed is not None:
        scores = scores.masked_fill(~allowed[:, :, None], torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    if allowed is not None:
        weights = weights.masked_fill(~allowed[:, :, None], 0.0)  # a query that may see nothing gets 0, as from every kernel
    return (weights.to(v.dtype) @ v[:, :, None]).flatten(1, 2).reshape(batch, heads, queries, -1)


def attend_rotary(joined: Tensor, heads: int, rope: tuple[Tensor, Tensor], plan: MaskPlan) -> Tensor | None:
    """The same of queries, keys and values side by side (B, T, (H + 2 Hkv) * hd), queries and keys not yet turned by `rope`, to (B, T, H * hd);
    None where no kernel takes them so."""
    if plan.block is not None:
        return None
    return attention.rotary(joined, heads, rope, plan.dense, plan.is_causal, 1 / math.sqrt(2 * rope[0].shape[-1]))
