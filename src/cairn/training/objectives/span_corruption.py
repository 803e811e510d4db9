"""Span corruption: spans are replaced by sentinels in what is read, and written out in what is said (T5's objective)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from cairn.catalog import Paper, register
from cairn.data.text.denoising import Denoiser
from cairn.training.objectives.denoising import SpanDenoising


@register(
    "objective",
    "span-corruption",
    paper=Paper("Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", "arXiv:1910.10683"),
)
class SpanCorruption(SpanDenoising):
    """Say the hidden spans of a text (section 3.1.4), in a decoder behind the text or in an encoder-decoder."""

    rate: float = Field(0.15, gt=0, lt=1)
    """Share of the tokens that is hidden."""
    span: float = Field(3.0, ge=1)
    """Mean length of a hidden span."""
    mode: str | None = None
    """Special token in front of what is read."""

    def table(self) -> Sequence[Denoiser]:
        return [Denoiser(mode=self.mode, rate=self.rate, span=self.span)]
