"""Where in a merged task vector the knowledge of each expert lies: one bit per weight and expert.

    m_i = 1 where |tau_i| > threshold * |tau_M - tau_i|,   tau_M = sum_i tau_i, or the sum of TIES

which for a threshold of 1 is the mask that brings m * tau_M nearest to tau_i in the l1 distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating.walk import Walk
from cairn.errors import InputError
from cairn.merging.arithmetic import Based
from cairn.merging.methods.ties import disjoint, trim, trim_thresholds


def masks(vectors: torch.Tensor, merged: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Boolean rows (N, items): which weights of the merged vector (items,) serve each expert (N, items), at its threshold (N,)."""
    return vectors.abs() > thresholds[:, None] * (merged - vectors).abs_()


def pack(mask: torch.Tensor) -> torch.Tensor:
    """A boolean mask (items,) as bytes (ceil(items / 8),), the first item in the lowest bit."""
    return torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))


def unpack(packed: torch.Tensor, items: int) -> torch.Tensor:
    """The boolean mask (items,) of its bytes."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=items, bitorder="little")).view(torch.bool)


class Localizing(Based):
    """Base of methods that build masks: how the merged vector is made and from which threshold on a weight serves an expert."""

    multi: Literal["sum", "ties"] = "sum"
    """The merged vector: the plain sum of task vectors, or that of TIES over the whole model."""
    density: float = Field(0.2, gt=0, le=1)
    """For `ties`: share of its changes that each expert keeps."""
    thresholds: float | list[float] = 0.4
    """One for all experts, or one per expert; the paper chooses among 0.2 to 0.6 by validation."""

    def check(self, parents: Sequence[Checkpoint]) -> None:
        super().check(parents)
        given = self.thresholds if isinstance(self.thresholds, list) else [self.thresholds] * (len(parents) - 1)
        if len(given) != len(parents) - 1 or min(given) < 0:
            raise InputError(f"thresholds has {len(given)} values for {len(parents) - 1} experts; give one number, or one per expert, none below zero.")

    def whole_model(self) -> bool:
        return self.multi == "ties" and self.density < 1

    def survey(self, walk: Walk) -> torch.Tensor:
        return trim_thresholds(walk, self.density)

    def merged(self, vectors: torch.Tensor, known: torch.Tensor | None) -> torch.Tensor:
        """The merged vector (items,) of task vectors (N, items)."""
        if self.multi == "sum":
            return vectors.sum(0)
        kept = vectors if known is None else trim(vectors, known)
        return disjoint(kept, torch.ones_like(vectors[:, :1]), False)

    def masks(self, vectors: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
        """Boolean rows (N, items)."""
        given = self.thresholds if isinstance(self.thresholds, list) else [self.thresholds] * len(vectors)
        return masks(vectors, merged, torch.tensor(given, dtype=vectors.dtype))
