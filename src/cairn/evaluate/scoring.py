"""Log-probabilities of texts: sorted by length, batched by tokens, shared among processes; what shares a batch changes nothing.

Sequences are padded on the right, where a causal model can not look, so a text's score does not depend on its neighbours
beyond the order of floating-point additions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import nn

BATCH_TOKENS = 8192
"""Tokens of one forward pass, padding included."""


def token_losses(model: nn.Module, tokens: torch.Tensor, mask: Any = None) -> torch.Tensor:
    """Negative log-likelihood (B, T - 1) of tokens (B, T) given those before, for our models and for transformers' causal models."""
    import torch.nn.functional as F

    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if hasattr(model, "architecture"):
        return model(inputs, mask=mask, targets=targets).token_loss
    logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")


def log_likelihoods(
    model: nn.Module, sequences: Sequence[Sequence[int]], batch_tokens: int = BATCH_TOKENS, starts: Sequence[int] | None = None
) -> NDArray[np.float64]:
    """Sum of the log-probabilities of the tokens of each sequence from its `starts` on (default: after the first), shape (n,), in nats.

    Under torch.distributed each process scores a share and all get all results. Sequences of fewer than two tokens score 0.
    """
    import torch

    device = next(model.parameters()).device
    scores = np.zeros(len(sequences))
    with torch.inference_mode():
        for batch in _batches(sequences, batch_tokens):
            longest = max(len(sequences[i]) for i in batch)
            padded = torch.zeros(len(batch), longest, dtype=torch.int64)
            for row, index in enumerate(batch):
                padded[row, : len(sequences[index])] = torch.as_tensor(sequences[index])
            losses = token_losses(model, padded.to(device)).double().cpu().numpy()
            for row, index in enumerate(batch):
                first = starts[index] - 1 if starts is not None else 0
                scores[index] = -losses[row, first : len(sequences[index]) - 1].sum()
    return gathered(scores)


def share_of(count: int) -> NDArray[np.int64]:
    """Which of `count` items this process works on: every n-th, so that long ones are spread evenly."""
    import torch.distributed as dist

    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    return np.arange(rank, count, size)


def gathered(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values of which each process filled its own share and left zeros elsewhere, put together on all of them."""
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return values
    total = torch.from_numpy(values)
    if dist.get_backend() == "nccl":
        total = total.cuda()
    dist.all_reduce(total)
    return total.cpu().numpy()


def _batches(sequences: Sequence[Sequence[int]], batch_tokens: int) -> list[list[int]]:
    lengths = np.array([len(sequence) for sequence in sequences])
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 1][share_of(int((lengths > 1).sum()))]
    batches: list[list[int]] = []
    for index in order.tolist():
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches
