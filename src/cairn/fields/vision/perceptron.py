"""The network of the family `mlp`."""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

from torch import Tensor, nn


class Sizes(Protocol):
    """What the network has to know of its family's config."""

    @property
    def widths(self) -> list[int]:
        """From the pixels to the classes."""

    @property
    def rectified(self) -> bool:
        """Whether the classifier reads the last hidden layer through a rectifier."""


class Perceptron(nn.Module):
    """Images (B, C, H, W) to the logits (B, K) of the classes."""

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        self.architecture = config
        self.layers = nn.ModuleList(nn.Linear(wide, narrow) for wide, narrow in pairwise(config.widths[:-1]))
        self.classifier = nn.Linear(config.widths[-2], config.widths[-1])

    def blocks(self) -> list[nn.Module]:
        """The hidden layers, bottom first: what sharding works on."""
        return list(self.layers)

    def features(self, pixel_values: Tensor) -> Tensor:
        """What the classifier reads: the last hidden layer (B, F)."""
        x = pixel_values.flatten(1)
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        found: Tensor = self.layers[-1](x)
        return found.relu() if self.architecture.rectified else found

    def forward(self, pixel_values: Tensor) -> Tensor:
        found: Tensor = self.classifier(self.features(pixel_values))
        return found
