"""Cross-entropy over a vocabulary that never holds all its logits.

The logits of a few rows at a time are computed, turned into the loss and, as the weights of the rows are known, at
once into the gradient of the sum; the backward pass only scales it. Memory is one chunk instead of (N, V) three times,
and the chunk stays in cache. The softmax is computed in float32 (float64 for float64 inputs).

Both functions are torch operators with a registered gradient: torch.compile leaves them whole and fuses what is around.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cairn import native
from cairn.models.kernels.linear import matmul

CHUNK_BYTES = {"cpu": 16 * 2**20}
"""Bytes of float32 logits in one chunk: on a CPU few enough to stay in cache, many enough for products at their full rate."""
CHUNK_BYTES_ELSEWHERE = 512 * 2**20


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None = None, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Sum over rows of `weights * (nll + z_loss * lse^2)`, and the negative log-likelihood of each row.

    hidden (N, D); weight (V, D), used in hidden's dtype; targets (N,) int64, anything where the row's weight is 0;
    weights (N,) float, default 1. Returns the loss, a scalar that can be differentiated once with respect to hidden
    and weight, and nll (N,), detached; float32, or float64 for float64 inputs. lse is the logarithm of the sum of
    exponentials of a row's logits ("PaLM", 2204.02311, section 5).
    """
    if weights is None:
        weights = torch.ones(targets.shape, dtype=torch.float32, device=targets.device)
    recording = torch.is_grad_enabled()
    loss, nll, _, _ = _summed(hidden, weight, targets, weights.detach(), z_loss, recording and hidden.requires_grad, recording and weight.requires_grad)
    return loss, nll


def linear_token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each row, each differentiable (once): for losses that weight rows by their own value.

    hidden (N, D), weight (V, D), targets (N,) int64; negative targets give 0. Returns (N,). The logits are computed
    again in the backward pass, a third more work than `linear_cross_entropy`.
    """
    nll, _ = _separate(hidden, weight, targets)
    return nll


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(rows: int, vocabulary: int, device: torch.device) -> list[tuple[int, int]]:
    size = max(64, CHUNK_BYTES.get(device.type, CHUNK_BYTES_ELSEWHERE) // (4 * vocabulary) // 64 * 64)
    return [(first, min(first + size, rows)) for first in range(0, rows, size)]


def _library() -> ctypes.CDLL | None:
    return native.library(Path(__file__).with_suffix(".c"))


class _Head:
    """The logits of one chunk after the other, in one buffer."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
        self.hidden, self.weight = hidden, weight.to(hidden.dtype)
        self.targets = targets.clamp(min=0)
        self.chunks = _chunks(len(hidden), len(weight), hidden.device)
        self.dtype = _accumulation(hidden.dtype)
        rows = self.chunks[0][1] if self.chunks else 0
        self.buffer = hidden.new_empty((rows, len(weight)), dtype=self.dtype)

    def rows(self, first: int, last: int, z_loss: float = 0.0, errors: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows first..last: (1 + 2 z lse) * softmax - onehot(target) (n, V) in the dtype of the matrix products, valid until the next
        chunk and only with `errors`; nll (n, 1) and lse (n, 1)."""
        buffer, target = self.buffer[: last - first], self.targets[first:last, None]
        library = _library() if self.hidden.device.type == "cpu" and self.hidden.dtype == torch.float32 else None
        if library is not None:
            return self._by_kernel(library, matmul(self.hidden[first:last], self.weight.t(), out=buffer), target.contiguous(), z_loss, errors)
        logits = matmul(self.hidden[first:last], self.weight.t())
        wanted = logits.gather(1, target).to(self.dtype)
        found = torch.log_softmax(logits, -1, dtype=self.dtype, out=buffer)
        nll = -found.gather(1, target)
        lse = wanted + nll
        if errors:
            found.exp_()
            if z_loss:
                found.mul_(1 + 2 * z_loss * lse)
            found.scatter_(1, target, found.gather(1, target) - 1)
        return found.to(self.hidden.dtype), nll, lse

    def _by_kernel(self, library: ctypes.CDLL, logits: Tensor, target: Tensor, z_loss: float, errors: bool) -> tuple[Tensor, Tensor, Tensor]:
        nll, lse = (logits.new_empty((len(logits), 1)) for _ in range(2))
        place, targets, *results = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (logits, target, nll, lse))
        rows, size = map(ctypes.c_int64, logits.shape)
        library.cairn_softmax_errors(place, rows, size, targets, ctypes.c_float(z_loss), errors, *results)
        return logits, nll, lse


@torch.library.custom_op("cairn::summed_linear_cross_entropy", mutates_args=())
def _summed(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, z_loss: float, hidden_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, nll (N,), and the gradients of the loss with respect to hidden and weight (empty where not asked for)."""
    with torch.autocast(hidden.device.type, enabled=False):
        head = _Head(hidden, weight, targets)
        loss = hidden.new_zeros((), dtype=head.dtype)
        nll = hidden.new_empty(len(hidden), dtype=head.dtype)
        grad_hidden = hidden.new_empty(hidden.shape if hidden_grad else (0,))
        grad_weight = weight.new_zeros(weight.shape if weight_grad else (0,), dtype=head.dtype)
        for first, last in head.chunks:
            scale = weights[first:last, None].to(head.dtype)
            errors, losses, lse = head.rows(first, last, z_loss, hidden_grad or weight_grad)
            nll[first:last] = losses[:, 0]
            loss += (scale * (losses + z_loss * lse.square())).sum()
            if hidden_grad:
                torch.mul(matmul(errors, head.weight), scale, out=grad_hidden[first:last])
            if weight_grad:
                _accumulate(grad_weight, errors, (hidden[first:last] * scale).to(hidden.dtype))
        return loss, nll, grad_hidden, grad_weight.to(weight.dtype)


def _accumulate(total: Tensor, errors: Tensor, hidden: Tensor) -> None:
    """total += errors^T hidden; low-precision products are summed over the chunks in float32."""
    if errors.dtype == total.dtype:
        total.addmm_(errors.t(), hidden)
    else:
        total += errors.t() @ hidden


@_summed.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, z_loss: float, hidden_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _accumulation(hidden.dtype)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(hidden.shape[0], dtype=dtype),
        hidden.new_empty(hidden.shape if hidden_grad else (0,)),
        weight.new_empty(weight.shape if weight_grad else (0,)),
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.asked = inputs[5], inputs[6]
    ctx.mark_non_differentiable(output[1], output[2], output[3])
    ctx.save_for_backward(output[2], output[3])


def _scale_gradients(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight = ctx.saved_tensors
    scaled = [gradient * grad_loss.to(gradient.dtype) if asked else None for gradient, asked in zip((hidden, weight), ctx.asked, strict=True)]
    return (*scaled, None, None, None, None, None)


_summed.register_autograd(_scale_gradients, setup_context=_keep_gradients)


@torch.library.custom_op("cairn::separate_linear_cross_entropy", mutates_args=())
def _separate(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """nll (N,), 0 where the target is negative, and lse (N,)."""
    with torch.autocast(hidden.device.type, enabled=False):
        head = _Head(hidden, weight, targets)
        nll, lse = (hidden.new_empty(len(hidden), dtype=head.dtype) for _ in range(2))
        for first, last in head.chunks:
            _, losses, totals = head.rows(first, last, errors=False)
            nll[first:last], lse[first:last] = losses[:, 0], totals[:, 0]
        return nll.masked_fill_(targets < 0, 0.0), lse


@_separate.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    dtype = _accumulation(hidden.dtype)
    return hidden.new_empty(hidden.shape[0], dtype=dtype), hidden.new_empty(hidden.shape[0], dtype=dtype)


@torch.library.custom_op("cairn::separate_linear_cross_entropy_backward", mutates_args=())
def _separate_backward(hidden: Tensor, weight: Tensor, targets: Tensor, grad_nll: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        head = _Head(hidden, weight, targets)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = weight.new_zeros(weight.shape, dtype=head.dtype)
        scales = grad_nll.to(head.dtype).masked_fill(targets < 0, 0.0)[:, None]
        for first, last in head.chunks:
            errors, _, _ = head.rows(first, last)
            torch.mul(matmul(errors, head.weight), scales[first:last], out=grad_hidden[first:last])
            _accumulate(grad_weight, errors, (hidden[first:last] * scales[first:last]).to(hidden.dtype))
        return grad_hidden, grad_weight.to(weight.dtype)


@_separate_backward.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, grad_nll: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(weight)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs)


def _recompute(ctx: Any, grad_nll: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
    grad_hidden, grad_weight = _separate_backward(*ctx.saved_tensors, grad_nll)
    return grad_hidden, grad_weight, None


_separate.register_autograd(_recompute, setup_context=_keep_inputs)
