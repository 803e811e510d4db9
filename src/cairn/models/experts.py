"""Mixtures of experts: a router chooses a few of many MLPs for each token. No token is dropped, whatever the load.

    p = softmax(x R),   y = sum over the k largest p_e of  w_e down_e(silu(gate_e(x)) * up_e(x)),   w_e = p_e, or p_e / sum of the k

    balance = E * sum_e f_e P_e,   f_e: chosen times per token, P_e: mean of p_e

Sources: "Switch Transformers" (2101.03961, equations 4 to 6), "Mixtral of Experts" (2401.04088, section 2), "OLMoE" (2409.02060, section 2).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cairn.models.config import ExpertSizes
from cairn.models.kernels.experts import Combined, Sorted, grouped_linear
from cairn.models.kernels.linear import Linear, is_plain


class Routed(NamedTuple):
    """What a router made of a batch."""

    logits: Tensor
    """(B, T, E)."""
    chosen: Tensor
    """(B, T, k) int64: the experts of each token."""


def balance(routed: Sequence[Routed]) -> Tensor:
    """How unevenly the routers of several layers spread the tokens of each row, (B,): 1 for each expert that is chosen where all are alike.

    It is what transformers' `load_balancing_loss_func` gives of a batch of that row alone; `balance` of a batch that has been flattened
    to one row is what it gives of that batch.
    """
    count = routed[0].logits.shape[-1]
    # Means over layers and positions before the product, as the published function takes them.
    shares = torch.stack([_chosen_times(each, count).mean(1) for each in routed]).mean(0)
    odds = torch.stack([_wide(each.logits.softmax(-1)).mean(1) for each in routed]).mean(0)
    return count * (shares * odds).sum(-1)


def loads(routed: Sequence[Routed]) -> Tensor:
    """How often each expert of each layer was chosen, (L, E) float32."""
    return torch.stack([times(each.chosen.flatten(), each.logits.shape[-1]) for each in routed]).float()


def flattened(routed: Sequence[Routed]) -> list[Routed]:
    """All rows of a batch as one."""
    return [Routed(each.logits.flatten(0, 1)[None], each.chosen.flatten(0, 1)[None]) for each in routed]


def times(numbers: Tensor, count: int) -> Tensor:
    """How often each number below `count` is in (n,) int64: (count,) int64, of a shape that does not depend on the values."""
    return torch.zeros(count, dtype=torch.int64, device=numbers.device).scatter_add_(0, numbers, torch.ones_like(numbers))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _chosen_times(routed: Routed, count: int) -> Tensor:
    """(B, T, E): 1 where an expert was chosen for a token."""
    zeros = torch.zeros((*routed.chosen.shape[:-1], count), dtype=_wide(routed.logits).dtype, device=routed.chosen.device)
    return zeros.scatter(-1, routed.chosen, 1.0)


class Expert(nn.Module):
    """down(silu(gate(x)) * up(x)); `names` are those of its matrices."""

    def __init__(self, width: int, sizes: ExpertSizes) -> None:
        super().__init__()
        gate, up, down = self.names = sizes.names
        self.add_module(gate, Linear(width, sizes.size, bias=False))
        self.add_module(up, Linear(width, sizes.size, bias=False))
        self.add_module(down, Linear(sizes.size, width, bias=False))

    @property
    def matrices(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Gate, up and down."""
        gate, up, down = (self.get_submodule(name) for name in self.names)
        return gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.matrices
        out: Tensor = down(F.silu(gate(x)) * up(x))
        return out


class MixtureOfExperts(nn.Module):
    """The experts of a layer and their router, `gate`. While it `records`, `routed` is what the router made of the last batch."""

    def __init__(self, width: int, sizes: ExpertSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.gate = Linear(width, sizes.total, bias=False)
        self.experts = nn.ModuleList(Expert(width, sizes) for _ in range(sizes.total))
        self.records = False
        self.routed: Routed | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        logits = self.gate(x)
        weights, chosen = logits.softmax(-1, dtype=logits.dtype if logits.dtype == torch.float64 else torch.float32).topk(self.sizes.chosen, dim=-1)
        if self.sizes.normed:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.records:
            self.routed = Routed(logits, chosen)
        order = chosen.flatten().argsort(stable=True)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        rows = Sorted.apply(x.flatten(0, 1), order, places, self.sizes.chosen)
        said = self._said(rows, times(chosen.flatten(), self.sizes.total))
        weights = weights if self.sizes.wide else weights.to(logits.dtype)
        weighed = said * weights.flatten()[order, None]
        return Combined.apply(weighed.to(x.dtype), order, places, self.sizes.chosen).view(x.shape)

    def _said(self, rows: Tensor, counts: Tensor) -> Tensor:
        """What each expert says of its rows. Experts that are cut, adapted or watched are called one by one."""
        triples = [expert.matrices for expert in cast(Iterable[Expert], self.experts)]
        if all(is_plain(matrix) for triple in triples for matrix in triple):
            gates, ups, downs = ([matrix.weight for matrix in column] for column in zip(*triples, strict=True))
            return grouped_linear(F.silu(grouped_linear(rows, counts, gates)) * grouped_linear(rows, counts, ups), counts, downs)
        # One to which nothing was sent is called too, so that every process has a gradient of every weight.
        return torch.cat([expert(part) for expert, part in zip(cast(Iterable[Expert], self.experts), rows.split(counts.tolist()), strict=True)])


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[list[Routed]]:
    """A list that holds, once the context is left, what the routers of a model made of the batch that was passed through it inside."""
    found: list[Routed] = []
    layers = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    for layer in layers:
        layer.records = True
    try:
        yield found
        found += [layer.routed for layer in layers if layer.routed is not None]
    finally:
        for layer in layers:
            layer.records, layer.routed = False, None
