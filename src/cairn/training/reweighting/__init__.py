"""Reweighting: how much each sequence of a batch counts, decided anew in every step.

A reweighting sees the losses of all sequences of the GLOBAL batch, over ranks and micro-batches, and gives each a weight; the
weights add up to 1 and carry no gradient. Where a rank's share is one micro-batch the losses come from the forward pass that
is differentiated anyway; where it is several, from a forward pass before, since a weight hangs on losses that come later.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from cairn.options import Options
from cairn.training.context import Later

if TYPE_CHECKING:
    import torch

    from cairn.training.context import MicroBatch, TrainingContext


class Reweighting(Options, ABC):
    """Base of all reweightings."""

    catalog_kind: ClassVar[str] = "reweighting"

    token_weighted: bool = False
    """Whether a sequence also counts by its number of tokens; the mean of equal weights is then that over tokens."""

    @abstractmethod
    def weights(self, losses: torch.Tensor, tokens: int, batch: int) -> torch.Tensor:
        """Weights (M,) that add up to 1, from the mean losses (M,) of the sequences of a batch; float64. `tokens` have been
        trained on before this step, which takes `batch`."""

    def pinned(self, batch: int, total: int) -> Self:
        """A copy with every amount in tokens."""
        return self


def weighted_gradients(trainer: TrainingContext, micro_batches: list[MicroBatch], reweighting: Reweighting) -> tuple[torch.Tensor, Mapping[str, float]]:
    """Accumulate the gradient of sum_i w_i l_i over the global batch; returns its plain mean loss over tokens and figures of the weights.

    l_i is the mean loss of sequence i over its positions; sequences of which no position counts have no part in it.
    """
    import torch

    world = trainer.world
    counts = torch.cat([micro_batch.inputs["weights"].sum(1, dtype=torch.float64) for micro_batch in micro_batches])
    if len(micro_batches) == 1:
        with world.accumulating(trainer.forward, True):
            losses = _mean_losses(trainer, micro_batches[0])
            found = _Weighed(trainer, losses.detach(), counts, reweighting)
            ((losses * found.factors.to(losses.dtype)).sum() * world.gradient_factor).backward()
    else:
        with torch.no_grad(), world.accumulating(trainer.forward, False):
            losses = torch.cat([_mean_losses(trainer, micro_batch) for micro_batch in micro_batches])
        found = _Weighed(trainer, losses, counts, reweighting)
        _second_pass(trainer, micro_batches, found.factors / counts.to(losses.device).clamp(min=1e-9))
    return found.loss, Later(lambda: {name: float(value) for name, value in found.figures.items()} | _shares(trainer, micro_batches, found.weights))


class _Weighed:
    """Factors and weights (n,) of a rank's sequences in the global batch, its mean loss over tokens, and figures of all weights."""

    def __init__(self, trainer: TrainingContext, losses: torch.Tensor, counts: torch.Tensor, reweighting: Reweighting) -> None:
        import torch

        world = trainer.world
        all_losses, all_counts = world.gathered(losses.double()), world.gathered(counts.to(losses.device))
        live = all_counts > 0
        weights = torch.zeros_like(all_losses)
        weights[live] = reweighting.weights(all_losses[live], trainer.progress.units, trainer.recipe.training.batch)
        factors = weights * all_counts / all_counts.sum() * live.sum() if reweighting.token_weighted else weights
        own = slice(world.replica * len(losses), (world.replica + 1) * len(losses))
        self.factors, self.weights = factors[own], weights[own]
        self.loss = (all_losses * all_counts).sum() / all_counts.sum()
        figures = {"loss": (factors * all_losses).sum(), "ess": 1 / weights.square().sum(), "largest": weights.max()}
        self.figures = {f"reweighting/{name}": value for name, value in figures.items()}


def _mean_losses(trainer: TrainingContext, micro_batch: MicroBatch) -> torch.Tensor:
    """The mean loss of each sequence (B,) over the positions that count, 0 where none does."""
    with trainer.autocast():
        inputs = trainer.moved(micro_batch)
        losses = trainer.recipe.objective.token_losses(trainer.forward, inputs)
    return (losses * inputs["weights"]).sum(1) / inputs["weights"].sum(1).clamp(min=1e-9)


def _second_pass(trainer: TrainingContext, micro_batches: list[MicroBatch], factors: torch.Tensor) -> None:
    """The gradient, micro-batch by micro-batch, with each position's weight times its sequence's factor."""
    begin = 0
    for index, micro_batch in enumerate(micro_batches):
        with trainer.world.accumulating(trainer.forward, index == len(micro_batches) - 1), trainer.autocast():
            inputs = trainer.moved(micro_batch)
            rows = factors[begin : begin + len(inputs["weights"]), None]
            inputs["weights"] = inputs["weights"].double() * rows
            (trainer.recipe.objective.loss(trainer.forward, inputs).total * trainer.world.gradient_factor).backward()
        begin += len(rows)


def _shares(trainer: TrainingContext, micro_batches: list[MicroBatch], weights: torch.Tensor) -> dict[str, float]:
    """The share of the weight that each source has, where there are several."""
    names = [source.name for source in trainer.feed.sources]
    if len(names) == 1:
        return {}
    sources: Any = np.concatenate([micro_batch.sources for micro_batch in micro_batches])
    sums = trainer.world.sums(np.bincount(sources, weights.cpu().numpy(), len(names)).tolist())
    return {f"reweighting/share/{name}": share for name, share in zip(names, sums, strict=True)}
