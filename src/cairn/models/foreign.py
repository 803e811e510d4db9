"""A model of transformers that answers like ours: masks, targets and weights in, a summed loss out; its own calls work as before."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cairn.models import masks
from cairn.models.anatomy import anatomy
from cairn.models.decoder import Output

_THEIRS = object()


class Answering:
    """What is put in front of a transformers class: `forward` of `cairn.models.decoder.Decoder` beside its own."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        *positional: Any,
        mask: Any = _THEIRS,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        z_loss: float = 0.0,
        each: bool = False,
        **theirs: Any,
    ) -> Any:
        """Asked with `mask` (None: causal) it answers as ours do; else the call goes to transformers as it is."""
        if mask is _THEIRS:
            return super().forward(input_ids, *positional, **theirs)  # type: ignore[misc]
        assert input_ids is not None
        logits = super().forward(input_ids=input_ids, attention_mask=_additive(self, mask, input_ids), use_cache=False).logits  # type: ignore[misc]
        if targets is None:
            return Output(logits, None, None)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        losses = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        if each:
            return Output(None, None, losses)
        summed = losses + z_loss * wide.logsumexp(-1).square() if z_loss else losses
        return Output(None, (summed if weights is None else summed * weights).sum(), losses.detach())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        model: Any = self
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        tied = head is not None and head.weight is embedding.weight
        super()._apply(fn, recurse)  # type: ignore[misc]
        if tied:
            head.weight = embedding.weight  # a move that allocates new parameters would otherwise split what is tied
        return self

    def blocks(self) -> list[nn.Module]:
        """The blocks in the order in which they are passed."""
        model: Any = self
        return [model.get_submodule(block.name) for block in anatomy(model).blocks]


def trainable(model: nn.Module) -> nn.Module:
    """The same module, of a class that also answers like ours."""
    model.__class__ = type(type(model).__name__, (Answering, type(model)), {"__module__": type(model).__module__})
    return model


def _additive(model: Any, mask: masks.Mask | None, ids: Tensor) -> Tensor | None:
    """The mask as numbers to add to the scores, which every attention of transformers understands."""
    if mask is None:
        return None
    dtype = next(model.parameters()).dtype
    allowed = mask.dense(ids.shape[0], ids.shape[1], ids.shape[1], device=ids.device)
    return torch.zeros(allowed.shape, dtype=dtype, device=ids.device).masked_fill_(~allowed, torch.finfo(dtype).min)
