"""Objectives: what the loss is.

An objective has a data side, `arrays`, which turns samples into the model's inputs on the loader's thread with numpy
alone, and a model side, `loss`, which returns a SUM over positions. The loop divides by the weight of the whole global
batch, so that micro-batches and ranks never change what is computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cairn.options import Options

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cairn.data.feed import Samples


@dataclass
class Loss:
    """What an objective returns for one micro-batch: the scalar sum to differentiate and sums to report beside it."""

    total: torch.Tensor
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Objective(Options, ABC):
    """Base of all objectives."""

    @abstractmethod
    def arrays(self, samples: Samples) -> dict[str, np.ndarray]:
        """Model inputs for `samples`, each with the samples on its first axis; `weights` (n, T) float32 is required:
        the weight of each position in the loss, whose sum over the global batch is what the loss is divided by."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Loss:
        """Sum of the weighted losses of a micro-batch whose tensors come from `arrays`."""

    @property
    def separable(self) -> bool:
        """Whether `token_losses` gives what `loss` adds up."""
        return False

    def token_losses(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The loss of each position (n, T), unweighted, each of which can be differentiated."""
        raise NotImplementedError(f"{type(self).__name__} is not separable")
