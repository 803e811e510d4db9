"""Reading the prompts of a batch before the first new token: padded, one by one, or prepacked.

All ways fill the same cache: each prompt without its last token, ending in the same column, so that decoding goes on for all at once.
The last token of each prompt is held back; it is what the first decoding step feeds. A prompt of one token has nothing to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from cairn.errors import InputError
from cairn.generation import prepack
from cairn.generation.cache import KeyValueCache
from cairn.models import masks

Batching = Literal["prepack", "pack", "pad", "one"]
BUDGET_TOKENS = 8192
"""Tokens of one pass over prepacked rows."""


@dataclass(frozen=True)
class _Way:
    share: bool
    pack: bool
    budget: int


_WAYS = {
    "prepack": _Way(share=True, pack=True, budget=BUDGET_TOKENS),
    "pack": _Way(share=False, pack=True, budget=BUDGET_TOKENS),
    "pad": _Way(share=False, pack=False, budget=2**62),
    "one": _Way(share=False, pack=False, budget=1),
}


class Prefilled(NamedTuple):
    """A cache that holds `prompt[:-1]` of every prompt in the columns before `length`; `processed` tokens were read for it, padding
    included, and `scores` entries of attention computed (rows x width^2)."""

    cache: KeyValueCache
    length: int
    processed: int
    scores: int


def plan(prompts: Sequence[Sequence[int]], batching: str = "prepack", row_tokens: int = 1) -> list[prepack.Batch]:
    """The passes that read the prompts without their last tokens.

    batching: `prepack` shares common beginnings and packs rows as wide as the longest prompt; `pack` only packs ("Prepacking",
    2404.09529); `pad` is one pass padded to the longest prompt; `one` reads prompts one by one. Raises `InputError` for another word.
    """
    if batching not in _WAYS:
        raise InputError(f"batching is '{batching}'; it is one of {', '.join(_WAYS)}.")
    way = _WAYS[batching]
    forest = prepack.trees([prompt[:-1] for prompt in prompts], share=way.share)
    return list(prepack.batches(forest, way.budget, row_tokens, pack=way.pack))


def prefill(model: nn.Module, prompts: Sequence[Sequence[int]], new: int, batching: str = "prepack") -> Prefilled:
    """Read prompts (ids, each at least one) with our decoder, leaving room for `new` more tokens in the cache."""
    first, longest = next(model.parameters()), max(map(len, prompts))
    architecture: object = model.architecture
    cache = KeyValueCache(architecture, len(prompts), longest + new, dtype=first.dtype, device=first.device)  # type: ignore[arg-type]
    processed = scores = 0
    for batch in plan(prompts, batching):
        rows, width = batch.tokens.shape
        tokens, positions, ends = (torch.from_numpy(a).to(first.device) for a in (batch.tokens, batch.positions, batch.ends))
        read = KeyValueCache(architecture, rows, width, dtype=first.dtype, device=first.device)  # type: ignore[arg-type]
        mask = None if all(len(path) == width for _, _, path in batch.places) and len(batch.places) == rows else masks.tree(ends)
        model(tokens, mask=mask, positions=positions, cache=read, logits=torch.empty(0, dtype=torch.int64, device=first.device))
        for text, row, path in batch.places:
            columns = torch.from_numpy(path).to(first.device)
            cache.place(text, read.keys[:, row][:, :, columns], read.values[:, row][:, :, columns], longest - 1)
        processed, scores = processed + rows * width, scores + rows * width * width
    cache.hold(longest - 1)
    return Prefilled(cache, longest - 1, processed, scores)
