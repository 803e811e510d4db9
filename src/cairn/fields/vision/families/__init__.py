"""Families of models that read images: one file each, registered in the catalog as kind 'architecture'."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from cairn.models.config import Network
from cairn.training.fields.labels import Labelled, class_logits

if TYPE_CHECKING:
    import torch
    from torch import nn


class ImageNetwork(Network):
    """A family of models that read square images (n, C, H, W); what is left open in a recipe is taken from the data."""

    reads: ClassVar[str] = "images"

    image_size: int = Field(224, ge=1)
    """Height and width of an image; left open, the data's."""
    num_channels: int = Field(3, ge=1)
    """Left open, the data's."""

    def bounds(self) -> str:
        return f"it sees pictures of {self.image_size} x {self.image_size} pixels with {self.num_channels} channel(s), and nothing larger in full"

    @abstractmethod
    def outputs(self) -> list[dict[str, Any]]:
        """What the model gives: name, dtype, shape and the meaning of each axis."""

    @abstractmethod
    def scores(self, model: nn.Module, pixel_values: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
        """Of one picture (1, C, H, W) what the model says most plainly, as numbers (K,), and the name of each."""

    @abstractmethod
    def image_flops(self) -> int:
        """Floating-point operations of all matrix products of one forward pass over one image, head included."""

    @abstractmethod
    def activation_bytes(self, images: int, precision: str) -> int:
        """Estimated bytes that the backward pass keeps for so many images, without recomputation."""


class ImageClassifier(ImageNetwork, Labelled):
    """One that gives the logits (n, K) of classes."""

    def outputs(self) -> list[dict[str, Any]]:
        return [class_logits(self.classes, ["batch", "class"], ["one picture of the batch"])]

    def scores(self, model: nn.Module, pixel_values: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
        return model(pixel_values)[0], self.classes
