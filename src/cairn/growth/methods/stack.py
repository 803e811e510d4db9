"""G_stack: the whole small model, several times on top of itself.

layer_i(large) = layer_(i mod L)(small),   i = 0 .. gL - 1

It does not keep the function: the loss jumps and recovers, and the paper finds that it recovers to a better place than any
growth that keeps the function.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch

from cairn.catalog import Paper, register
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating.stream import copied
from cairn.growth.frame import Deeper, Target
from cairn.growth.layers import ORDERS

PAPER = Paper("Stacking Your Transformers: A Closer Look at Model Growth for Efficient LLM Pre-Training", "arXiv:2405.15319", card=49)

FACTOR = 4.0
"""The paper's advice (section 4.3); 2 to 4 work."""


@register("growth", "stack", paper=PAPER)
class StackGrowth(Deeper):
    """Layers of the small model copied in some order; the default, the whole model again and again, with factor 4 (section 3, G_direct)."""

    sample_options: ClassVar[dict[str, Any]] = {"factor": 2}

    order: Literal["stack", "interleave", "solar", "short"] = "stack"
    """0 1 2 0 1 2; each layer in place, 0 0 1 1 2 2; two copies that overlap, 0 1 2 1 2 3; the last layers once more, 0 1 2 3 2 3."""

    def layer_map(self, small: int) -> list[int]:
        grown = (
            self
            if self.factor is not None or self.layers is not None
            else self.model_copy(update={"factor": FACTOR if self.order in ("stack", "interleave") else 1.5})
        )
        return ORDERS[self.order](small, grown.deep(small))

    def values(self, target: Target, parent: Checkpoint, known: Any) -> Iterator[torch.Tensor]:
        yield from copied(parent.tensors[target.source])
