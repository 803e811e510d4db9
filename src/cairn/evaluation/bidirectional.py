"""How the request engine reads models that see a context as a whole: prefix decoders and encoder-decoders.

A context is read in both directions and the continuation from left to right, so that nothing is shared between requests of different
contexts; an encoder reads each distinct context of a pass once. Requests of similar length share a pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cairn.generation.bidirectional import sources
from cairn.models import masks


class Request(NamedTuple):
    """`tokens` from `start` on are wanted; `number` says which request it is."""

    number: int
    tokens: list[int]
    start: int


def groups(sequences: Sequence[list[int]], starts: Sequence[int], budget: int, most_logits: int) -> list[list[Request]]:
    """The requests that share a pass: equal contexts side by side, at most `budget` tokens with padding and `most_logits` wanted positions."""
    asked = [Request(number, tokens, start) for number, (tokens, start) in enumerate(zip(sequences, starts, strict=True)) if len(tokens) > start]
    found: list[list[Request]] = []
    widest = wanted = 0
    for one in sorted(asked, key=lambda r: (r.start, r.tokens[: r.start], len(r.tokens), r.tokens)):
        widest, wanted = max(widest, len(one.tokens)), wanted + len(one.tokens) - one.start
        if not found or (len(found[-1]) + 1) * widest > budget or wanted > most_logits:
            found.append([])
            widest, wanted = len(one.tokens), len(one.tokens) - one.start
        found[-1].append(one)
    return found


def logits_of(model: nn.Module, group: Sequence[Request]) -> Tensor:
    """Logits (N, V) for every wanted token of the requests, in order."""
    architecture: Any = model.architecture
    return _behind_encoder(model, group) if architecture.encoder_decoder else _behind_prefix(model, group)


def processed(group: Sequence[Request]) -> int:
    """Tokens that are read for the requests, padding included."""
    return len(group) * max(len(one.tokens) for one in group)


def _behind_prefix(model: nn.Module, group: Sequence[Request]) -> Tensor:
    device = next(model.parameters()).device
    width = max(len(one.tokens) for one in group) - 1
    ids = torch.tensor([one.tokens[:-1] + [0] * (width + 1 - len(one.tokens)) for one in group], device=device)
    chosen = [row * width + column for row, one in enumerate(group) for column in range(one.start - 1, len(one.tokens) - 1)]
    lengths = torch.tensor([one.start for one in group], device=device)
    mask = masks.prefix(lengths) if int(lengths.max()) > 1 else None
    return model(ids, mask=mask, logits=torch.tensor(chosen, device=device)).logits


def _behind_encoder(model: nn.Module, group: Sequence[Request]) -> Tensor:
    device, architecture = next(model.parameters()).device, model.architecture
    contexts = list(dict.fromkeys(tuple(one.tokens[: one.start]) for one in group))
    ids, valid = sources(model, contexts)
    read = model.encode(ids, masks.padded(valid, within=masks.full()))  # type: ignore[operator]
    which = torch.tensor([contexts.index(tuple(one.tokens[: one.start])) for one in group], device=device)
    width = max(len(one.tokens) - one.start for one in group)
    rows = list(_said(group, architecture.start_id, width))  # type: ignore[union-attr]
    chosen = [row * width + column for row, one in enumerate(group) for column in range(len(one.tokens) - one.start)]
    output = model(
        None,
        decoder_input_ids=torch.tensor(rows, device=device),
        read=read[which],
        cross=masks.cross(valid[which]),
        logits=torch.tensor(chosen, device=device),
    )
    return output.logits


def _said(group: Sequence[Request], start: Any, width: int) -> Iterator[list[int]]:
    for one in group:
        before = [int(start), *one.tokens[one.start : -1]]
        yield before + [0] * (width - len(before))
