"""Prefix language modelling: the beginning of a text is read, the rest is said. Also what fine-tuning on prompts and answers is."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from cairn.catalog import Paper, register
from cairn.data.text import denoising
from cairn.data.text.denoising import Example
from cairn.errors import InputError
from cairn.training.objectives import Setting
from cairn.training.objectives.denoising import Denoising, keys_of

if TYPE_CHECKING:
    from cairn.data.text.feed import Samples


class PrefixSegment(NamedTuple):
    """A document in a window of tokens: begin and end (of its targets' positions), and how many of its tokens are read."""

    begin: int
    end: int
    read: int


@register(
    "objective",
    "prefix-lm",
    paper=Paper("Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", "arXiv:1910.10683"),
)
class PrefixLM(Denoising):
    """Say what follows a prefix (section 3.2.1): of each window, or of each document where documents are kept apart."""

    split: Literal["uniform", "fixed", "marker"] = "uniform"
    """Where the prefix ends: anywhere, so that `rate` of the text is left, or behind the first `marker` (a text without one is not learned from)."""
    rate: float = Field(0.25, gt=0, lt=1)
    marker: str | None = None
    """The text that ends a prompt; documents must be kept apart."""
    marker_ids: list[int] = []
    """Filled in when the run begins."""

    shared_rows: ClassVar[bool] = True

    @model_validator(mode="after")
    def _marker_where_it_is_used(self) -> Self:
        if (self.split == "marker") != bool(self.marker):
            raise ValueError("marker: write the text that ends a prompt together with split=marker.")
        return self

    def fitted(self, setting: Setting) -> Self:
        if self.split == "marker" and not setting.documents:
            raise InputError(
                "Objective 'prefix-lm' with split=marker takes each document for a prompt and its answer; set data.packing=whole or data.documents=mask."
            )
        found = super().fitted(setting)
        return found.model_copy(update={"marker_ids": setting.preprocessor.encode(self.marker)}) if self.marker else found

    def sizes(self, length: int) -> tuple[int, int]:
        if self.split == "fixed":
            left, _ = denoising.counts(length, self.rate, length)
            return length - left + 1, left
        return length + 1, length

    def arrays(self, samples: Samples) -> dict[str, np.ndarray]:
        if self.ready.attention == "cross":
            return self._pairs(samples) if samples.documents is not None else self._separate(samples)
        return self._in_place(samples)

    def _in_place(self, samples: Samples) -> dict[str, np.ndarray]:
        """Nothing moves: the prefix is flagged, and what it predicts of itself does not count."""
        flags, counted = np.zeros(samples.weights.shape, bool), np.zeros(samples.weights.shape, bool)
        for row in range(len(flags)):
            for piece in self._pieces(samples, row):
                flags[row, piece.begin : piece.begin + piece.read] = True
                counted[row, piece.begin + piece.read - 1 : piece.end] = True
        arrays: dict[str, np.ndarray] = {"input_ids": samples.tokens[:, :-1], "targets": samples.tokens[:, 1:], "weights": samples.weights * counted}
        if samples.documents is not None:
            arrays["documents"] = samples.documents[:, :-1]
        if self.ready.attention == "prefix":
            arrays["prefix"] = flags if samples.documents is not None else flags.sum(1)
        return arrays

    def _separate(self, samples: Samples) -> dict[str, np.ndarray]:
        length = samples.tokens.shape[1] - 1
        examples = [
            Example(samples.tokens[row, : piece.read], samples.tokens[row, piece.read : length], closed=False)
            for row in range(len(samples.tokens))
            for piece in self._pieces(samples, row, length)
        ]
        return self.laid_out(examples, length, self.sizes(length))

    def _pairs(self, samples: Samples) -> dict[str, np.ndarray]:
        """The documents of a window as pairs, in the same order in the encoder's row and in the decoder's."""
        n, length, end = len(samples.tokens), samples.tokens.shape[1] - 1, self.ready.end
        arrays: dict[str, np.ndarray] = {
            "input_ids": np.full((n, length + 1), end),
            "input_documents": np.full((n, length + 1), -1),
            "decoder_input_ids": np.full((n, length), end),
            "documents": np.zeros((n, length), np.int64),
            "targets": np.full((n, length), end),
            "weights": np.zeros((n, length), np.float32),
        }
        arrays["input_documents"][:, 0] = 0  # what fills up a decoder's row looks at the first document: attention must have somewhere to look
        for row in range(n):
            read = said = 0
            for number, piece in enumerate(self._pieces(samples, row)):
                tokens = samples.tokens[row, piece.begin : piece.end + 1]
                front = int(tokens[0] == end)  # what begins a document for a decoder, an encoder is not given
                inputs, targets = np.append(tokens[front : piece.read], end), tokens[piece.read :]
                here, there = slice(read, read + len(inputs)), slice(said, said + len(targets))
                arrays["input_ids"][row, here], arrays["input_documents"][row, here] = inputs, number
                arrays["targets"][row, there], arrays["documents"][row, there] = targets, number
                arrays["decoder_input_ids"][row, said + 1 : there.stop] = targets[:-1]
                arrays["weights"][row, there] = samples.weights[row, piece.begin + piece.read - 1 : piece.end]
                read, said = here.stop, there.stop
        return arrays

    def _pieces(self, samples: Samples, row: int, length: int | None = None) -> Iterator[PrefixSegment]:
        """The documents of a window that have a prefix and something after it."""
        length = samples.tokens.shape[1] if length is None else length
        tokens, key = samples.tokens[row], int(keys_of(samples)[row])
        numbers = samples.documents[row] if samples.documents is not None else np.zeros(length, np.int64)
        cuts = [0, *(np.flatnonzero(np.diff(numbers[:length])) + 1).tolist(), length]
        for number, (begin, stop) in enumerate(pairwise(cuts)):
            # The last target of a document is the end-of-text that begins the next one, where it counts.
            end = stop if stop < length and samples.weights[row, stop - 1] else stop - 1
            if numbers[begin] < 0 or end <= begin:
                continue
            read = self._read(tokens[begin : end + 1], key, number)
            if read is not None and read <= end - begin:
                yield PrefixSegment(begin, end, read)

    def _read(self, tokens: np.ndarray, key: int, number: int) -> int | None:
        if self.split != "marker":
            return denoising.split_point(len(tokens), key, self.rate if self.split == "fixed" else None, number)
        size = len(self.marker_ids)
        if len(tokens) < size:
            return None
        found = np.flatnonzero((np.lib.stride_tricks.sliding_window_view(tokens, size) == self.marker_ids).all(axis=1))
        return int(found[0]) + size if len(found) else None
