"""Masked language modelling: single tokens are masked, replaced or kept, and have to be said."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from pydantic import Field

from cairn.catalog import Paper, register
from cairn.data.text import denoising
from cairn.data.text.denoising import Example
from cairn.training.objectives import Setting
from cairn.training.objectives.denoising import Denoising, keys_of

if TYPE_CHECKING:
    from cairn.data.text.feed import Samples


@register("objective", "mlm", paper=Paper("BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", "arXiv:1810.04805"))
class MaskedLM(Denoising):
    """Say the masked tokens where they stand, seeing all of the text; an encoder-decoder says the whole text and is asked for those."""

    sees_all: ClassVar[bool] = True

    rate: float = Field(0.15, gt=0, lt=1)
    """Share of the tokens that is asked for: of them 80 % are masked, 10 % replaced by others, 10 % left."""
    mask: str = "[MASK]"
    """The special token that hides one."""

    def special_tokens(self) -> list[str]:
        return [self.mask]

    def fitted(self, setting: Setting) -> Self:
        found = super().fitted(setting)
        # Where it stands the model has to see all: a decoder is read as an encoder.
        return found if found.ready.attention == "cross" else found.model_copy(update={"fit": found.ready.model_copy(update={"attention": "full"})})

    def sizes(self, length: int) -> tuple[int, int]:
        return length // 2, length // 2

    def arrays(self, samples: Samples) -> dict[str, np.ndarray]:
        room = samples.tokens.shape[1] - 1
        size = room // 2 - 1 if self.ready.attention == "cross" else room
        drawn = []
        for window, key in zip(samples.tokens, keys_of(samples), strict=True):
            begin = denoising.below(int(key), denoising.WHERE, len(window) - size + 1)
            text = window[begin : begin + size]
            drawn.append((text, *denoising.masked(text, self.rate, int(key), self.ready.special[self.mask], self.ready.words)))
        if self.ready.attention == "cross":
            return self.laid_out([Example(read, text, counted=np.append(asked, False)) for text, read, asked in drawn], room, self.sizes(room))
        texts, read, asked = (np.stack(each) for each in zip(*drawn, strict=True))
        return {"input_ids": read, "targets": texts, "weights": asked.astype(np.float32), "prefix": np.full(len(texts), size)}
