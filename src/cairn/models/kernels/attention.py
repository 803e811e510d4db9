"""Attention on a CPU in float32 by a kernel of ours (`attention.c`), where it is the faster one.

torch's kernel for CPUs takes twice as long where heads are small; docs/benchmarks/train_step.md has figures of whole
steps. Values and gradients are those of `scaled_dot_product_attention` up to rounding; a query that may see nothing
gets 0. Every other device, dtype, mask and kind of tensor takes torch's own path.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cairn import native

FEWEST_QUERIES = 16
"""With fewer a step of generation is bound by reading its cache, and calling the operator costs more than it saves."""
LARGEST_HEAD = 256


class _Shape(ctypes.Structure):
    """`shape` of attention.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "queries", "keys", "size")),
        *((name, ctypes.c_int64 * 3) for name in ("q", "k", "v", "out", "error", "dq", "dk", "dv")),
        *((name, ctypes.c_int64 * 2) for name in ("mask", "rope")),
        ("scale", ctypes.c_float),
        ("causal", ctypes.c_int),
    ]


def _library() -> ctypes.CDLL | None:
    return native.library(Path(__file__).with_suffix(".c"))


_known: dict[str, int] = {}
"""What compiled code takes for constant: `lanes` and `threads`, as `prepare` found them."""


def prepare() -> None:
    """Ask the kernel and torch now for what a compiled step cannot ask for; it is called before a model is built.

    `torch.compiler.assume_constant_result` would do the same, but it loads the compiler, which takes longer than all else here.
    """
    library = _library()
    _known["lanes"] = library.cairn_attention_lanes() if library is not None else 0
    _known["threads"] = torch.get_num_threads()


def lanes() -> int:
    """Numbers in a vector of this processor, of which the size of a head must be a multiple; 0 without a kernel."""
    if "lanes" not in _known:
        prepare()
    return _known["lanes"]


def _threads() -> int:
    return _known["threads"] if torch.compiler.is_compiling() else torch.get_num_threads()


def suits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel takes q (B, H, Tq, hd), k and v (B, Hkv, Tk, hd) and a mask: plain float32 on the CPU, whole vectors, a boolean
    mask (1 or B, 1, Tq, Tk) or none, no autocast, and heads enough for all threads."""
    for tensor in (q, k, v):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu" or tensor.dtype != torch.float32:
            return False
    if mask is not None and (mask.dtype != torch.bool or mask.shape not in ((1, 1, q.shape[2], k.shape[2]), (len(q), 1, q.shape[2], k.shape[2]))):
        return False
    if q.shape[2] < FEWEST_QUERIES or q.shape[3] > LARGEST_HEAD or v.shape != k.shape or torch.is_autocast_enabled("cpu"):
        return False
    return k.shape[0] * k.shape[1] >= _threads() and lanes() > 0 and q.shape[3] % lanes() == 0


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Attention of what `suits`, to (B, H, Tq, hd); causal only without a mask and for as many queries as keys. scale > 0."""
    return _attention(q, k, v, mask, causal, scale)[0]


def rotary(joined: Tensor, heads: int, rope: tuple[Tensor, Tensor], mask: Tensor | None, causal: bool, scale: float) -> Tensor | None:
    """Attention of queries, keys and values that lie side by side in each row of `joined` (B, T, (H + 2 Hkv) * hd), queries and keys turned by
    the angles of their positions on the way (`models.rope.rotate`), to (B, T, H * hd): two passes over them less in each
    direction. H is `heads`; rope: cosine and sine (1 or B, T, 1, hd / 2). None where the kernel does not take them.
    """
    cosine, sine = (angles.squeeze(2) for angles in rope)
    size = 2 * cosine.shape[-1]
    parts = _parts(joined, heads, size)
    if not suits(*parts, mask) or not suits_rope(cosine) or not suits_rope(sine):
        return None
    return _rotary(joined, heads, cosine, sine, mask, causal, scale)[0]


def suits_rope(angles: Tensor) -> bool:
    """Whether the kernel turns by these cosines or sines (1 or B, T, hd / 2): plain float32 of whole vectors that need no gradient."""
    return type(angles) is Tensor and angles.dtype == torch.float32 and not angles.requires_grad and angles.shape[-1] % lanes() == 0


def _parts(joined: Tensor, heads: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, T, hd), keys and values (B, Hkv, T, hd) as views of `joined` (B, T, (H + 2 Hkv) * hd)."""
    kv_heads = (joined.shape[-1] // size - heads) // 2
    q, k, v = joined.unflatten(-1, (-1, size)).transpose(1, 2).split([heads, kv_heads, kv_heads], 1)
    return q, k, v


def _rows(tensor: Tensor) -> Tensor:
    """With numbers of a row side by side; rows may lie anywhere."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p | None]:
    return [None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _steps(tensor: Tensor, *axes: int) -> list[int]:
    """Strides; 0 where one entry serves a whole batch."""
    return [tensor.stride(axis) if axis or len(tensor) > 1 else 0 for axis in axes]


class _Call:
    """One call of the kernel: what both directions need. The tensors of q, k, v and their kin are (B, H, T, hd)."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rope: tuple[Tensor, Tensor] | None, causal: bool, scale: float) -> None:
        library = _library()
        assert library is not None
        self._library = library
        self.shape = _Shape(*q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], scale=scale, causal=causal)
        self._mask = None if mask is None else _rows(mask)
        self._rope: tuple[Tensor | None, Tensor | None] = (None, None)
        if self._mask is not None:
            self.shape.mask = (ctypes.c_int64 * 2)(*_steps(self._mask, 0, 2))
        if rope is not None:
            self._rope = rope[0].contiguous(), rope[1].contiguous()
            self.shape.rope = (ctypes.c_int64 * 2)(*_steps(self._rope[0], 0, 1))
        self._inputs = _rows(q), _rows(k), _rows(v)
        self._place(q=self._inputs[0], k=self._inputs[1], v=self._inputs[2])

    def _place(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            setattr(self.shape, name, (ctypes.c_int64 * 3)(*tensor.stride()[:3]))

    def forward(self, out: Tensor, sums: Tensor) -> None:
        self._place(out=out)
        self._library.cairn_attention(ctypes.byref(self.shape), *_pointers(*self._inputs, self._mask, *self._rope, out, sums))

    def backward(self, out: Tensor, sums: Tensor, error: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        error = _rows(error)
        self._place(out=out, error=error, dq=dq, dk=dk, dv=dv)
        pointers = _pointers(*self._inputs, self._mask, *self._rope, out, sums, error, dq, dk, dv)
        self._library.cairn_attention_backward(ctypes.byref(self.shape), *pointers)


def _laid_out(like: Tensor) -> Tensor:
    """Empty (B, H, T, hd) in the memory order (B, T, H, hd), which the projections around attention read and write."""
    batch, heads, length, size = like.shape
    return like.new_empty((batch, length, heads, size)).transpose(1, 2)


@torch.library.custom_op("cairn::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The result, and the logarithm of each query's sum of exponentials (B, H, Tq)."""
    out, sums = _laid_out(q), q.new_empty(q.shape[:3])
    _Call(q, k, v, mask, None, causal, scale).forward(out, sums)
    return out, sums


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return _laid_out(q), q.new_empty(q.shape[:3])


@torch.library.custom_op("cairn::attention_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, sums: Tensor, gradient: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    found = _laid_out(q), _laid_out(k), _laid_out(v)
    _Call(q, k, v, mask, None, causal, scale).backward(out, sums, gradient, *found)
    return found


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, sums: Tensor, gradient: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _laid_out(q), _laid_out(k), _laid_out(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.causal, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, mask, *output)


def _gradients(ctx: Any, gradient: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, mask, out, sums = ctx.saved_tensors
    return (*_backward(q, k, v, mask, out, sums, gradient, ctx.causal, ctx.scale), None, None, None)


_attention.register_autograd(_gradients, setup_context=_keep)


@torch.library.custom_op("cairn::rotary_attention", mutates_args=())
def _rotary(joined: Tensor, heads: int, cosine: Tensor, sine: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The result (B, T, H * hd), and the logarithm of each query's sum of exponentials (B, H, T)."""
    out, sums = _empty_rotary(joined, heads, cosine)
    size = 2 * cosine.shape[-1]
    _Call(*_parts(joined, heads, size), mask, (cosine, sine), causal, scale).forward(out.unflatten(-1, (-1, size)).transpose(1, 2), sums)
    return out, sums


def _empty_rotary(joined: Tensor, heads: int, cosine: Tensor) -> tuple[Tensor, Tensor]:
    batch, length = joined.shape[:2]
    return joined.new_empty((batch, length, heads * 2 * cosine.shape[-1])), joined.new_empty((batch, heads, length))


@_rotary.register_fake
def _(joined: Tensor, heads: int, cosine: Tensor, sine: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return _empty_rotary(joined, heads, cosine)


@torch.library.custom_op("cairn::rotary_attention_backward", mutates_args=())
def _rotary_backward(
    joined: Tensor, heads: int, cosine: Tensor, sine: Tensor, mask: Tensor | None, out: Tensor, sums: Tensor, gradient: Tensor, causal: bool, scale: float
) -> Tensor:
    found, size = joined.new_empty(joined.shape), 2 * cosine.shape[-1]
    out, gradient = (tensor.unflatten(-1, (-1, size)).transpose(1, 2) for tensor in (out, gradient))
    _Call(*_parts(joined, heads, size), mask, (cosine, sine), causal, scale).backward(out, sums, gradient, *_parts(found, heads, size))
    return found


@_rotary_backward.register_fake
def _(
    joined: Tensor, heads: int, cosine: Tensor, sine: Tensor, mask: Tensor | None, out: Tensor, sums: Tensor, gradient: Tensor, causal: bool, scale: float
) -> Tensor:
    return joined.new_empty(joined.shape)


def _keep_rotary(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    joined, ctx.heads, cosine, sine, mask, ctx.causal, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(joined, cosine, sine, mask, *output)


def _rotary_gradients(ctx: Any, gradient: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
    joined, cosine, sine, mask, out, sums = ctx.saved_tensors
    return _rotary_backward(joined, ctx.heads, cosine, sine, mask, out, sums, gradient, ctx.causal, ctx.scale), None, None, None, None, None, None


_rotary.register_autograd(_rotary_gradients, setup_context=_keep_rotary)
