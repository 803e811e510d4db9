"""Models that read a prompt as a whole, in both directions, before they write: prefix decoders and encoder-decoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cairn.generation.cache import KeyValueCache
from cairn.models import masks


class Prefixed:
    """A prefix decoder: one pass over all prompts, shorter ones on the right, then one token at a time."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], new: int) -> None:
        first, longest = next(model.parameters()), max(map(len, prompts))
        self.model, self.device = model, first.device
        architecture: Any = model.architecture
        self.cache = KeyValueCache(architecture, len(prompts), longest + new, dtype=first.dtype, device=first.device)
        self.starts = torch.tensor([longest - len(prompt) for prompt in prompts], device=self.device)
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=self.device)
        columns = torch.arange(longest, device=self.device)
        mask = masks.padded(columns >= self.starts[:, None], within=masks.full())
        positions = (columns - self.starts[:, None]).clamp(min=0)
        self.logits = model(ids, mask=mask, positions=positions, cache=self.cache, logits="last").logits[:, -1]

    def first(self) -> Tensor:
        return self.logits

    def following(self, chosen: list[int]) -> Tensor:
        mask = masks.padded(torch.arange(self.cache.capacity, device=self.device) >= self.starts[:, None])
        ids = torch.tensor(chosen, device=self.device)[:, None]
        return self.model(ids, mask=mask, positions=self.cache.length - self.starts[:, None], cache=self.cache, logits="last").logits[:, -1]

    def keep(self, rows: list[int]) -> None:
        kept = torch.tensor(rows, device=self.device)
        self.cache.keep(kept)
        self.starts = self.starts[kept]


class Paired:
    """An encoder-decoder: the prompts are encoded once, and each layer's view of them is kept beside the decoder's cache."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], new: int) -> None:
        first = next(model.parameters())
        self.model, self.device = model, first.device
        architecture: Any = model.architecture
        ids, self.valid = sources(model, prompts)
        mask = masks.padded(self.valid, within=masks.full())
        self.read = model.remember(model.encode(ids, mask))  # type: ignore[operator]
        self.cache = KeyValueCache(architecture, len(prompts), new, dtype=first.dtype, device=first.device)
        self.start = [architecture.start_id] * len(prompts)

    def first(self) -> Tensor:
        return self.following(self.start)

    def following(self, chosen: list[int]) -> Tensor:
        ids = torch.tensor(chosen, device=self.device)[:, None]
        output = self.model(None, decoder_input_ids=ids, read=self.read, cross=masks.cross(self.valid), cache=self.cache, logits="last")
        return output.logits[:, -1]

    def keep(self, rows: list[int]) -> None:
        kept = torch.tensor(rows, device=self.device)
        self.cache.keep(kept)
        self.read, self.valid = [(k[kept], v[kept]) for k, v in self.read], self.valid[kept]


def sources(model: nn.Module, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """What the encoder reads of prompts, (B, E) ids padded on the right, and which of them count (B, E)."""
    architecture: Any = model.architecture
    device = next(model.parameters()).device
    rows = [architecture.source(prompt) for prompt in prompts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows], device=device)
    return ids, torch.arange(longest, device=device) < torch.tensor([[len(row)] for row in rows], device=device)
