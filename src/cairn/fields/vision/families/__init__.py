"""Families of models that read images: one file each, registered in the catalog as kind 'architecture'."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, field_validator

from cairn.models.config import Network


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


class ImageClassifier(ImageNetwork):
    """One that gives the logits (n, K) of classes."""

    id2label: dict[str, str] = {"0": "LABEL_0", "1": "LABEL_1"}
    """The classes by their numbers; left open, the data's."""

    @field_validator("id2label", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        return {str(number): name for number, name in value.items()} if isinstance(value, Mapping) else value

    @field_validator("id2label")
    @classmethod
    def _without_gaps(cls, value: dict[str, str]) -> dict[str, str]:
        if not value or set(value) != {str(number) for number in range(len(value))}:
            raise ValueError(f"id2label: classes are numbered from 0 without a gap, not {', '.join(value) or 'none at all'}.")
        return {str(number): value[str(number)] for number in range(len(value))}

    @property
    def classes(self) -> list[str]:
        """Names of the classes, by number."""
        return list(self.id2label.values())
