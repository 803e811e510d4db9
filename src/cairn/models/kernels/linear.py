"""Linear layers that use the faster of the CPU's two matrix libraries.

On x86 torch sends float32 products to MKL, which on processors that are not Intel's is often slower than oneDNN, the
library that torch uses for every other dtype; docs/benchmarks/train_step.md has figures. There the forward product and
the gradient of the input go to oneDNN (float32 arithmetic, as before) and the gradient of the weight, where MKL is the
faster one, stays. Every other processor, device, dtype and kind of tensor takes torch's own path.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cairn import native

FEWEST_ROWS = 32
"""Below this a product is bound by memory, and calling the operator costs more than it saves."""


def available() -> bool:
    """Whether this torch can hand plain float32 tensors to oneDNN on this processor."""
    x86 = "AVX" in torch.backends.cpu.get_cpu_capability()
    return x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_FASTER = available() and "GenuineIntel" not in native.processor()
"""Whether oneDNN is taken where it can be: a rule by the processor, for timings would let a resumed run choose otherwise."""


def plain(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of x (..., i) and weight (o, i) is a large one of plain float32 tensors on the CPU.

    Subclasses of Tensor (a shard of a parallel plan) bring their own rules and are left alone.
    """
    if not (type(x) in (Tensor, nn.Parameter) and type(weight) in (Tensor, nn.Parameter)):
        return False
    if not (x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32):
        return False
    return x.numel() >= FEWEST_ROWS * x.shape[-1] and not torch.is_autocast_enabled("cpu")


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of x (..., i) and weight (o, i) goes to oneDNN."""
    return _FASTER and plain(x, weight)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) times b (K, N), float32 on the CPU, by oneDNN. a must be contiguous, b or its transpose."""
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a (M, K) times b (K, N) by the faster library, without a gradient; in `out` where the library can, which saves new memory."""
    return product(a, b) if suits(a, b) else torch.mm(a, b, out=out)


@torch.library.custom_op("cairn::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, i) times the transpose of weight (o, i)."""
    return product(x.contiguous(), weight.t())


@_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.custom_op("cairn::linear_input_gradient", mutates_args=())
def _input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient (N, o) times weight (o, i)."""
    return product(gradient.contiguous(), weight.contiguous())


@_input_gradient.register_fake
def _(gradient: Tensor, weight: Tensor) -> Tensor:
    return gradient.new_empty((gradient.shape[0], weight.shape[1]))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    for_x, for_weight = ctx.needs_input_grad
    return _input_gradient(gradient, weight) if for_x else None, gradient.t() @ x if for_weight else None


_linear.register_autograd(_gradients, setup_context=_keep)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., i) times the transpose of weight (o, i), by the faster library."""
    if not suits(x, weight):
        return F.linear(x, weight)
    return _linear(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


class Linear(nn.Linear):
    """nn.Linear, with the same parameters and results, that is faster in float32 on x86 CPUs."""

    def forward(self, input: Tensor) -> Tensor:
        if not suits(input, self.weight):
            return F.linear(input, self.weight, self.bias)
        out = linear(input, self.weight)
        return out if self.bias is None else out + self.bias


def joined(x: Tensor, *layers: Linear) -> Tensor | None:
    """The outputs of several linear layers of one input, side by side, from one product; None unless each is large and plain.

    A wide product is faster than several narrow ones, and the gradient of the input needs no sum. Layers with a bias, with
    hooks, or of another class (parametrized, adapted, of a parallel plan) are to be called one by one.
    """
    if not all(is_plain(layer) and layer.bias is None and plain(x, layer.weight) for layer in layers):
        return None
    return linear(x, torch.cat([layer.weight for layer in layers]))


def apart(x: Tensor, wide: Tensor | None, *layers: Linear) -> list[Tensor]:
    """The outputs of the layers one by one, from what `joined` gave of them."""
    return [layer(x) for layer in layers] if wide is None else list(wide.split([len(layer.weight) for layer in layers], -1))


def together(x: Tensor, *layers: Linear) -> list[Tensor]:
    """The outputs of several linear layers of one input, `joined` where they can be."""
    return apart(x, joined(x, *layers), *layers)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is a linear map and nothing else, so that its weight may stand for it: not parametrized, adapted, cut or watched."""
    watched = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer) is Linear and type(layer.weight) in (Tensor, nn.Parameter) and not watched
