"""How a model is read: logits of chosen positions of packed rows, for our decoder and for any causal model of transformers.

A transformers family is not trusted to honour a tree mask: a model is asked once, on a small tree, whether it then says what it says
of each text alone. The fastest way that passes is taken: its trunk with the head on chosen positions only, the whole model, rows of
one text each padded on the right, and at last one text at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cairn.generation import limits, prepack
from cairn.models import masks
from cairn.models.rope import steady_length

Read = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(tokens (B, W), positions (B, W), ends (B, W), chosen (N,) as b * W + t) to logits (N, V)."""

PROBE = ([1, 2, 3, 4, 1, 2], [1, 2, 3, 3], [1, 2, 0, 2, 2, 1, 3], [2, 1])
"""Texts of the smallest ids that share beginnings, on which a family is tried."""


@dataclass(frozen=True)
class Way:
    """A way to read a model: whether beginnings may be shared and texts packed, whether rows may be batched, and up to which length."""

    read: Read
    packs: bool = True
    batches: bool = True
    longest: int | None = None
    """Texts longer than this are read alone: their rope or attention window depends on how long they are."""


def way_of(model: Any) -> Way:
    """The fastest way to read the model that is right for it. Raises `InputError` for one that is not causal."""
    limits.require_causal(model)
    if hasattr(model, "architecture"):
        return Way(lambda tokens, positions, ends, chosen: _ours(model, tokens, positions, ends, chosen), longest=steady_length(model.architecture))
    limit = _foreign_limit(model.config)
    candidates = [Way(_through_trunk(model), longest=limit), Way(_whole(model), longest=limit)] if _takes_positions(model) else []
    for way in [*candidates, Way(_plain(model), packs=False, longest=limit)]:
        if _holds(model, way):
            return way
    return Way(_plain(model), packs=False, batches=False)


def _ours(model: nn.Module, tokens: Tensor, positions: Tensor, ends: Tensor, chosen: Tensor) -> Tensor:
    if _alone(ends):
        return model(tokens, logits=chosen).logits
    return model(tokens, mask=masks.tree(ends), positions=positions, logits=chosen).logits


def _through_trunk(model: Any) -> Read:
    trunk, head = model.base_model, model.get_output_embeddings()

    def read(tokens: Tensor, positions: Tensor, ends: Tensor, chosen: Tensor) -> Tensor:
        hidden = trunk(input_ids=tokens, attention_mask=_additive(model, ends), position_ids=positions, use_cache=False)[0]
        return head(hidden.flatten(0, 1)[chosen])

    return read


def _whole(model: Any) -> Read:
    def read(tokens: Tensor, positions: Tensor, ends: Tensor, chosen: Tensor) -> Tensor:
        logits = model(input_ids=tokens, attention_mask=_additive(model, ends), position_ids=positions, use_cache=False).logits
        return logits.flatten(0, 1)[chosen]

    return read


def _plain(model: Any) -> Read:
    """Rows of one text each; what follows a text on its right is out of a causal model's sight."""

    def read(tokens: Tensor, positions: Tensor, ends: Tensor, chosen: Tensor) -> Tensor:
        return model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)[chosen]

    return read


def _alone(ends: Tensor) -> bool:
    """Whether one text stands here from its start: the model reads it by itself, with its own causal mask and window and the rope of its length."""
    return ends.shape[0] == 1 and bool((ends == ends.shape[1]).all())


def _additive(model: nn.Module, ends: Tensor) -> Tensor | None:
    """The tree mask as numbers to add to the scores, which every attention of transformers understands."""
    if _alone(ends):
        return None
    dtype = next(model.parameters()).dtype
    allowed = masks.tree(ends).dense(ends.shape[0], ends.shape[1], ends.shape[1], device=ends.device)
    return torch.zeros(allowed.shape, dtype=dtype, device=ends.device).masked_fill_(~allowed, torch.finfo(dtype).min)


def _takes_positions(model: Any) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters and model.get_output_embeddings() is not None


def _holds(model: Any, way: Way) -> bool:
    """Whether texts read this way get the logits that they get alone."""
    device = next(model.parameters()).device
    texts = [list(text) for text in PROBE]
    forest = prepack.trees(texts) if way.packs else [tree for text in texts for tree in prepack.trees([text])]
    (batch,) = prepack.batches(forest, 10**6, pack=way.packs)
    chosen = np.concatenate([row * batch.tokens.shape[1] + path for _, row, path in batch.places])
    arrays = [torch.from_numpy(a).to(device) for a in (batch.tokens, batch.positions, batch.ends, chosen)]
    with torch.inference_mode():
        alone = torch.cat([model(input_ids=torch.tensor([texts[n]], device=device), use_cache=False).logits[0] for n, _, _ in batch.places]).float()
        try:
            found = way.read(*arrays).float()
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            return False  # a family that refuses such a mask says so in any of these ways
    slack = 1e-4 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 3e-2
    return found.shape == alone.shape and bool((found - alone).abs().max() <= slack * alone.abs().max().clamp(min=1))


def _foreign_limit(config: Any) -> int | None:
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    limits = [getattr(text, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size")]
    if str(rope).find("dynamic") >= 0 or str(rope).find("longrope") >= 0:
        limits += [rope.get("original_max_position_embeddings") or text.max_position_embeddings]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)
