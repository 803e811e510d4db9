"""Families of models that read words: one file each, registered in the catalog as kind 'architecture'."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from cairn.models.config import Network


class WordNetwork(Network):
    """A family of models that read the pieces of words; what is left open in a recipe is taken from the data."""

    reads: ClassVar[str] = "words"

    @abstractmethod
    def sentence_flops(self, words: int) -> int:
        """Floating-point operations of all matrix products of one forward pass over a sentence of so many words."""

    @abstractmethod
    def activation_bytes(self, sentences: int, words: int, precision: str) -> int:
        """Estimated bytes that the backward pass keeps for so many sentences of so many words, without recomputation."""
