"""DARE: drop most of each expert's changes at random and rescale the rest, before they are merged.

tau^_i = m_i tau_i / density,   m_i ~ Bernoulli(density) for every weight
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from cairn import randomness
from cairn.catalog import Paper, register
from cairn.checkpoint.operating.walk import TensorSlice
from cairn.merging.arithmetic import Based, task_vectors
from cairn.merging.coefficients import Range, at
from cairn.merging.methods.task_arithmetic import added
from cairn.merging.methods.ties import disjoint


def drop(vectors: torch.Tensor, density: float, seed: int, name: str, begin: int) -> torch.Tensor:
    """Rows (N, items) with each item kept with probability `density` and rescaled; which ones depends on the seed, the
    expert's number, the tensor and the item's place in it, never on how the tensor was cut."""
    kept = torch.empty_like(vectors, dtype=torch.bool)
    counters = np.arange(begin, begin + vectors.shape[1])
    for row in range(len(vectors)):
        kept[row] = torch.from_numpy(randomness.uniform(randomness.seed_for(seed, "dare", name, row), counters) < density)
    return vectors * kept / density


@register("operation", "dare", paper=Paper("Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", "arXiv:2311.03099"))
class Dare(Based):
    """Drop changes at random and rescale (section 3.2), then add up as in task arithmetic or elect signs as in TIES."""

    space: ClassVar[dict[str, Range]] = {"scale": Range(0.05, 1.5, factors=True), "density": Range(0.1, 1.0)}

    density: float = Field(0.5, gt=0, le=1)
    """Share of the changes that each expert keeps."""
    elect: Literal["none", "sum", "mean"] = "none"
    """Add everything up, or elect a sign for each weight and take the sum or the mean of what agrees."""
    seed: int = Field(0, ge=0)
    """Seed of the random choice."""

    def blend(self, piece: TensorSlice, known: object) -> torch.Tensor:
        vectors = drop(task_vectors(piece.inputs), self.density, self.seed, piece.name, piece.begin)
        weights = self.column(piece.name, vectors)
        vectors = self.weighted(piece.name, vectors)
        vector = vectors.sum(0) if self.elect == "none" else disjoint(vectors, weights, self.elect == "mean")
        return added(piece.inputs[0], vector, at(self.scale, piece.name))
