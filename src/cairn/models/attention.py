"""Attention on a CPU in float32 by a kernel of ours (`attention.c`), where it is the faster one.

torch's kernel for CPUs runs small heads at a fifth of the rate of a matrix product; docs/benchmarks/train_step.md has
figures. Values and gradients are those of `scaled_dot_product_attention` up to rounding; a query that may see nothing
gets 0. Every other device, dtype, mask and kind of tensor takes torch's own path.
"""

from __future__ import annotations

import ctypes
import functools
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
        *((name, ctypes.c_int64 * 3) for name in ("q", "k", "v", "out")),
        ("mask", ctypes.c_int64 * 2),
        ("scale", ctypes.c_float),
        ("causal", ctypes.c_int),
    ]


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = native.library(Path(__file__).with_suffix(".c"))
    if library is not None:
        library.cairn_attention_lanes.restype = ctypes.c_int64
        library.cairn_attention.restype = library.cairn_attention_backward.restype = None
    return library


@torch.compiler.assume_constant_result
def lanes() -> int:
    """Numbers in a vector of this processor, of which the size of a head must be a multiple; 0 without a kernel."""
    library = _library()
    return library.cairn_attention_lanes() if library is not None else 0


@torch.compiler.assume_constant_result
def _threads() -> int:
    return torch.get_num_threads()


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


def _rows(tensor: Tensor) -> Tensor:
    """With numbers of a row side by side; rows may lie anywhere."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def _shape(q: Tensor, k: Tensor, v: Tensor, out: Tensor, mask: Tensor | None, causal: bool, scale: float) -> _Shape:
    shape = _Shape(*q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], scale=scale, causal=causal)
    for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
        setattr(shape, name, (ctypes.c_int64 * 3)(*tensor.stride()[:3]))
    if mask is not None:
        shape.mask = (ctypes.c_int64 * 2)(mask.stride(0) if len(mask) > 1 else 0, mask.stride(2))
    return shape


def _laid_out(like: Tensor) -> Tensor:
    """Empty (B, H, T, hd) in the memory order (B, T, H, hd), which the projections around attention read and write."""
    batch, heads, length, size = like.shape
    return like.new_empty((batch, length, heads, size)).transpose(1, 2)


@torch.library.custom_op("cairn::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The result, and the logarithm of each query's sum of exponentials (B, H, Tq)."""
    library = _library()
    assert library is not None
    q, k, v, mask = _rows(q), _rows(k), _rows(v), None if mask is None else _rows(mask)
    out, sums = _laid_out(q), q.new_empty(q.shape[:3])
    shape = _shape(q, k, v, out, mask, causal, scale)
    library.cairn_attention(ctypes.byref(shape), *map(_pointer, (q, k, v, mask, out, sums)))
    return out, sums


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return _laid_out(q), q.new_empty(q.shape[:3])


@torch.library.custom_op("cairn::attention_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, sums: Tensor, gradient: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    library = _library()
    assert library is not None
    q, k, v, gradient, mask = _rows(q), _rows(k), _rows(v), _rows(gradient), None if mask is None else _rows(mask)
    found = _laid_out(q), _laid_out(k), _laid_out(v)
    shape = _shape(q, k, v, out, mask, causal, scale)
    strides = (ctypes.c_int64 * 3)(*gradient.stride()[:3])
    library.cairn_attention_backward(ctypes.byref(shape), *map(_pointer, (q, k, v, mask, out, sums, gradient)), strides, *map(_pointer, found))
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
