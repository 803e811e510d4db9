"""What flows through a network: how activations and gradients grow from block to block, and how large attention logits become.

    growth exponent = (1/L) ln(|v_L| / |v_0|)

over L blocks, for the residual stream on its way up and for the gradient of the loss with respect to it on its way down; near
zero both keep their size whatever the depth ("2 OLMo 2 Furious", section 3).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cairn.models.decoder import Attention, Decoder


@dataclass(frozen=True)
class Signals:
    """Means over the positions of a batch. `activations` and `gradients` are L + 1 norms of the residual stream and of the gradient
    there, before the first block first; `attention` is the largest scaled |q . k| of each of the L blocks."""

    activations: list[float]
    gradients: list[float]
    attention: list[float]

    @property
    def activation_growth(self) -> float:
        """Growth exponent of the activations, upwards."""
        return _exponent(self.activations[0], self.activations[-1], len(self.attention))

    @property
    def gradient_growth(self) -> float:
        """Growth exponent of the gradients, downwards: from behind the last block to before the first."""
        return _exponent(self.gradients[-1], self.gradients[0], len(self.attention))

    @property
    def largest_logit(self) -> float:
        """The largest |attention logit| of all blocks."""
        return max(self.attention)


def _exponent(before: float, after: float, blocks: int) -> float:
    return math.log(after / before) / blocks


def signals(model: Decoder, ids: Tensor, targets: Tensor, weights: Tensor | None = None) -> Signals:
    """The signals of one forward and one backward pass over token ids (B, T) with targets (B, T) and their weights (B, T), causal
    attention; no gradient of a parameter is left behind."""
    stream: list[Tensor] = []
    attention: list[float] = []
    with torch.enable_grad(), _watched(model, stream, attention):
        loss = model(ids, targets=targets, weights=weights).loss
        gradients = torch.autograd.grad(loss, stream)
    norms = [[float(value.detach().float().norm(dim=-1).mean()) for value in values] for values in (stream, gradients)]
    return Signals(norms[0], norms[1], attention)


@contextlib.contextmanager
def _watched(model: Decoder, stream: list[Tensor], attention: list[float]) -> Iterator[None]:
    """Hooks that note the residual stream before the first and behind every block, and the largest logit of each."""

    def beginning(block: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        # A frozen embedding would leave nothing to differentiate by.
        stream.append(inputs[0] if inputs[0].requires_grad else inputs[0].detach().requires_grad_())
        return (stream[-1], *inputs[1:])

    def behind(block: Any, inputs: Any, output: Tensor) -> None:
        stream.append(output)

    def comparing(block: Attention, inputs: tuple[Any, ...]) -> None:
        with torch.no_grad():
            attention.append(_largest(*block.queries_and_keys(inputs[0], inputs[1]), block.scale))

    blocks: list[Any] = model.blocks()
    hooks = [blocks[0].register_forward_pre_hook(beginning)]
    for block in blocks:
        hooks += [block.register_forward_hook(behind), _attention(block).register_forward_pre_hook(comparing)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _attention(block: Any) -> Any:
    """The module of a block that can say what it compares."""
    return next(module for module in block.modules() if hasattr(module, "queries_and_keys"))


def _largest(q: Tensor, k: Tensor, scale: float) -> float:
    """The largest |logit| that a causal mask lets through."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q.float() @ k.float().transpose(-1, -2) * scale
    return float(logits.tril().abs().max())
