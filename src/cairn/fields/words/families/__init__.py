"""Families of models that read words: one file each, registered in the catalog as kind 'architecture'."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from cairn.models.config import Network


class WordNetwork(Network):
    """A family of models that read the pieces of words; what is left open in a recipe is taken from the data."""

    reads: ClassVar[str] = "words"

    def bounds(self) -> str:
        return "it sees one sentence at a time"

    @abstractmethod
    def outputs(self) -> list[dict[str, Any]]:
        """What the model gives: name, dtype, shape and the meaning of each axis."""

    @abstractmethod
    def sentence_flops(self, words: int) -> int:
        """Floating-point operations of all matrix products of one forward pass over a sentence of so many words."""

    @abstractmethod
    def activation_bytes(self, sentences: int, words: int, precision: str) -> int:
        """Estimated bytes that the backward pass keeps for so many sentences of so many words, without recomputation."""
