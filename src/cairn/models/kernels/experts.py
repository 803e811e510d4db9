"""Linear maps of groups of rows, each group with a matrix of its own: what a mixture of experts computes.

Tokens are sorted by expert once; each expert then reads contiguous rows and writes contiguous rows. The way there and the way back are
adjoint to one another and each is a gather, so that no pass adds up into shared rows. Products are torch.mm: how many rows an expert gets
changes with every batch, and oneDNN, which is otherwise the faster library here, prepares itself anew for each number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


class Sorted(torch.autograd.Function):
    """The rows of x (N, D) that experts read, (N * k, D), sorted by expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor, chosen: int) -> Tensor:
        ctx.save_for_backward(order, places)
        ctx.chosen = chosen
        return x[order // chosen]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        _, places = ctx.saved_tensors
        return gradient[places].unflatten(0, (-1, ctx.chosen)).sum(1), None, None, None


class Combined(torch.autograd.Function):
    """For each token the sum of what its experts said: y (N * k, D), sorted by expert, to (N, D)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, places: Tensor, chosen: int) -> Tensor:
        ctx.save_for_backward(order, places)
        ctx.chosen = chosen
        return y[places].unflatten(0, (-1, chosen)).sum(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        order, _ = ctx.saved_tensors
        return gradient[order // ctx.chosen], None, None, None


@torch.library.custom_op("cairn::grouped_linear", mutates_args=())
def _grouped(x: Tensor, counts: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Rows x (R, i), `counts` (E,) of them for each weight (o, i): (R, o)."""
    out = x.new_empty((x.shape[0], weights[0].shape[0]))
    for rows, place, weight in zip(_groups(x, counts), _groups(out, counts), weights, strict=True):
        if len(rows):
            torch.mm(rows, weight.t(), out=place)
    return out


@_grouped.register_fake
def _(x: Tensor, counts: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return x.new_empty((x.shape[0], weights[0].shape[0]))


@torch.library.custom_op("cairn::grouped_linear_backward", mutates_args=())
def _grouped_backward(gradient: Tensor, x: Tensor, counts: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of the rows, then those of the weights."""
    gradient = gradient.contiguous()
    for_x, found = torch.empty_like(x), []
    for rows, place, given, weight in zip(_groups(x, counts), _groups(for_x, counts), _groups(gradient, counts), weights, strict=True):
        found.append(given.t() @ rows)  # zeros for an expert that nothing was sent to: every process has a gradient of every weight
        if len(rows):
            torch.mm(given, weight, out=place)
    return [for_x, *found]


@_grouped_backward.register_fake
def _(gradient: Tensor, x: Tensor, counts: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x), *(torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights)]


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Sequence[Tensor]], output: Tensor) -> None:
    x, counts, weights = inputs
    ctx.save_for_backward(x, counts, *weights)


def _gradients(ctx: Any, gradient: Tensor) -> Any:
    x, counts, *weights = ctx.saved_tensors
    for_x, *for_weights = _grouped_backward(gradient, x, counts, weights)
    return for_x, None, for_weights


_grouped.register_autograd(_gradients, setup_context=_keep)


@register_flop_formula(torch.ops.cairn.grouped_linear)
def _operations(x: Any, counts: Any, weights: Any, *unused: Any, out_shape: Any = None, **more: Any) -> int:
    return int(2 * x[0] * x[1] * weights[0][0])


def _groups(x: Tensor, counts: Tensor) -> Sequence[Tensor]:
    return x.split(counts.tolist())


def grouped_linear(x: Tensor, counts: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Each group of rows of x (R, i) times the transpose of its weight (o, i): (R, o).

    Parameters
    ----------
    x
        Rows, sorted by group.
    counts
        (E,) int64: how many rows each group has, which may be none.
    weights
        E matrices (o, i).

    Returns
    -------
    (R, o), with gradients of the rows and of every weight.
    """
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
    if device == "cuda" and x.dtype == torch.bfloat16 and x.shape[-1] % 8 == 0 and weights[0].shape[0] % 8 == 0:
        return stacked_linear(x, counts, weights)
    out: Tensor = _grouped(x, counts, list(weights))
    return out


def stacked_linear(x: Tensor, counts: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """As `grouped_linear`, by torch's one product for all groups, which a GPU has for bfloat16 and rows that are multiples of 16 bytes."""
    return F.grouped_mm(x, torch.stack(list(weights)).transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))
