"""Families of models that read images: one file each, registered in the catalog as kind 'architecture'."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from pydantic import Field

from cairn.models.config import Network
from cairn.training.fields.labels import Labelled


class ImageNetwork(Network):
    """A family of models that read square images (n, C, H, W); what is left open in a recipe is taken from the data."""

    reads: ClassVar[str] = "images"

    image_size: int = Field(224, ge=1)
    """Height and width of an image; left open, the data's."""
    num_channels: int = Field(3, ge=1)
    """Left open, the data's."""

    @abstractmethod
    def image_flops(self) -> int:
        """Floating-point operations of all matrix products of one forward pass over one image, head included."""

    @abstractmethod
    def activation_bytes(self, images: int, precision: str) -> int:
        """Estimated bytes that the backward pass keeps for so many images, without recomputation."""


class ImageClassifier(ImageNetwork, Labelled):
    """One that gives the logits (n, K) of classes."""
