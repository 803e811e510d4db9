"""Denoising: which tokens of a text are hidden, and how the rest and the answer are written.

Span corruption, prefix language modelling and plain language modelling are one family ("UL2", 2205.05131, section 3.1): spans of a
text are chosen, each is replaced by a sentinel in what is read (the inputs), and is written out behind its sentinel in what has to
be said (the targets). Every choice is a number computed from (key of the sequence, purpose): the same question has the same answer, on
any machine, after any resume.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cairn.errors import InputError
from cairn.options import Options
from cairn.randomness import bits, uniform

Ids = NDArray[np.int64]

WHICH, WHERE, SPLIT, NOISE, KEPT, CHOSEN, KIND, WORD = (number << 40 for number in range(8))
"""Where the numbers for each purpose begin in the stream of a sequence's key."""


def below(key: int, purpose: int, size: int) -> int:
    """A uniform number of range(size)."""
    return int(uniform(key, purpose) * size)


# -- spans ------------------------------------------------------------------------------------------------------


def counts(length: int, rate: float, mean: float) -> tuple[int, int]:
    """How many of `length` tokens (at least 2) are hidden, and in how many spans.

    round(length * rate) of them, half to even, at least one and not all; round(hidden / mean) spans, at least one and no more than
    pieces of at least one token can be made of either side.
    """
    hidden = min(max(round(length * rate), 1), length - 1)
    return hidden, min(max(round(hidden / mean), 1), hidden, length - hidden)


def composition(total: int, parts: int, key: int, purpose: int) -> Ids:
    """`total` as a sum of `parts` positive numbers in order, every way with the same probability."""
    cuts = np.argsort(bits(key, purpose + np.arange(total - 1)), kind="stable")[: parts - 1] + 1
    return np.diff(np.concatenate([[0], np.sort(cuts), [total]]))


def noise_mask(length: int, rate: float, mean: float, key: int) -> NDArray[np.bool_]:
    """Which of `length` tokens are hidden (True): kept and hidden pieces in turn, from a kept one to a hidden one
    ("Exploring the Limits of Transfer Learning", section 3.1.4, as its code draws them)."""
    hidden, spans = counts(length, rate, mean)
    pieces = np.stack([composition(length - hidden, spans, key, KEPT), composition(hidden, spans, key, NOISE)], axis=1)
    return np.repeat(np.tile([False, True], spans), pieces.ravel())


def corrupted(tokens: Ids, mask: NDArray[np.bool_], sentinel: int) -> tuple[Ids, Ids]:
    """Inputs and targets of a text whose hidden tokens `mask` flags. Runs are numbered downwards from the id `sentinel`."""
    return _with_sentinels(tokens, mask, sentinel), _with_sentinels(tokens, ~mask, sentinel)


def _with_sentinels(tokens: Ids, mask: NDArray[np.bool_], sentinel: int) -> Ids:
    """The tokens with each run of flagged ones replaced by one sentinel."""
    first = mask & ~np.concatenate([[False], mask[:-1]])
    return np.where(first, sentinel - (np.cumsum(first) - 1), tokens)[~mask | first]


def restored(inputs: Ids, targets: Ids, sentinel: int, sentinels: int) -> Ids:
    """The text of which `corrupted` made inputs and targets: every sentinel gives way to what stands behind it in the targets."""
    places = np.flatnonzero((targets <= sentinel) & (targets > sentinel - sentinels))
    answers = {int(targets[at]): targets[at + 1 : end] for at, end in zip(places, [*places[1:], len(targets)], strict=True)}
    empty = np.zeros(0, np.int64)
    pieces = [answers.get(int(token), empty) if sentinel - sentinels < token <= sentinel else np.array([token]) for token in inputs]
    return np.concatenate([empty, *pieces]).astype(np.int64)


@functools.lru_cache(maxsize=256)
def longest_text(room: int, rate: float, mean: float, *, both: bool = True) -> int:
    """The longest text whose inputs and targets, each with its end, take at most `room` tokens; the inputs alone where not `both`."""
    length = 2
    while _room(length + 1, rate, mean, both) <= room:
        length += 1
    if _room(length, rate, mean, both) > room:
        raise InputError(f"{room} tokens have no room for a text of which {rate:.0%} is hidden in spans of {mean:g}; lengthen data.sequence_length.")
    return length


def _room(length: int, rate: float, mean: float, both: bool) -> int:
    hidden, spans = counts(length, rate, mean)
    return length + 2 * spans + 2 if both else length - hidden + spans + 1


def lengths(inputs: int, rate: float, mean: float) -> tuple[int, int]:
    """(text, targets): the longest text whose inputs fit into `inputs`, and how long its targets are.

    Where half is hidden and the targets are longer than the inputs, both are one shorter, as in T5's `random_spans_helper`.
    """
    text = longest_text(inputs, rate, mean, both=False)
    hidden, spans = counts(text, rate, mean)
    targets = hidden + spans + 1
    return (text - 1, targets - 1) if rate == 0.5 and targets > inputs else (text, targets)


# -- single tokens ----------------------------------------------------------------------------------------------


def masked(tokens: Ids, rate: float, key: int, mask_id: int, words: tuple[int, int]) -> tuple[Ids, NDArray[np.bool_]]:
    """The tokens as BERT reads them, and which ones it is asked for: round(length * rate) chosen at random, of which 80 % become
    `mask_id`, 10 % any id from words[0] to words[1] - 1, and 10 % stay ("BERT", 1810.04805, section 3.1)."""
    size = len(tokens)
    chosen = np.zeros(size, bool)
    chosen[np.argsort(bits(key, CHOSEN + np.arange(size)), kind="stable")[: min(max(round(size * rate), 1), size)]] = True
    kinds = uniform(key, KIND + np.arange(size))
    others = words[0] + (uniform(key, WORD + np.arange(size)) * (words[1] - words[0])).astype(np.int64)
    return np.where(chosen & (kinds < 0.8), mask_id, np.where(chosen & (kinds < 0.9), others, tokens)), chosen


# -- denoisers --------------------------------------------------------------------------------------------------


class Denoiser(Options):
    """One way to hide: spans of a mean length, or all that follows a point (the sequential denoiser). A row of UL2's table."""

    mode: str | None = None
    """Special token in front of the inputs that names this way."""
    rate: float = Field(0.15, gt=0, lt=1)
    """Share of the tokens that is hidden."""
    span: float | None = Field(3.0, gt=0)
    """Mean length of a hidden span; null hides one span at the end: a prefix is read and the rest has to be said."""
    split: Literal["uniform", "fixed"] = "uniform"
    """Where the rest begins when `span` is null: anywhere, or so that it is `rate` of the text."""
    weight: float = Field(1.0, gt=0)
    """Share of the sequences, relative to the other denoisers of a mixture."""

    @property
    def title(self) -> str:
        """A short name in the figures: `span3-15`, `prefix`."""
        return "prefix" if self.span is None else f"span{self.span:g}-{100 * self.rate:g}"

    def text_length(self, room: int) -> int:
        """How many tokens of text a sequence of `room` tokens (inputs, targets, their ends and the mode) has."""
        room -= self.mode is not None
        return room if self.span is None else longest_text(room, self.rate, self.span)

    def spans(self, room: int) -> int:
        """How many sentinels a sequence of `room` tokens needs."""
        return 0 if self.span is None else counts(self.text_length(room), self.rate, self.span)[1]

    def sizes(self, room: int) -> tuple[int, int]:
        """Most tokens of inputs and of targets, ends included where they have one."""
        length, mode = self.text_length(room), self.mode is not None
        if self.span is not None:
            hidden, spans = counts(length, self.rate, self.span)
            return mode + length - hidden + spans + 1, hidden + spans + 1
        if self.split == "uniform":
            return mode + length, length - 1
        hidden, _ = counts(length, self.rate, length)
        return mode + length - hidden + 1, hidden

    def example(self, tokens: Ids, key: int, sentinel: int, modes: Mapping[str, int], room: int) -> Example:
        """A sequence of `room` tokens from a window of at least as many; what part of the window is drawn too."""
        length = self.text_length(room)
        begin = below(key, WHERE, len(tokens) - length + 1)
        text = tokens[begin : begin + length]
        front = np.array([modes[self.mode]] if self.mode is not None else [], np.int64)
        if self.span is not None:
            inputs, targets = corrupted(text, noise_mask(length, self.rate, self.span, key), sentinel)
            return Example(np.concatenate([front, inputs]), targets)
        split = split_point(length, key, self.rate if self.split == "fixed" else None)
        return Example(np.concatenate([front, text[:split]]), text[split:], closed=False)


def split_point(length: int, key: int, rate: float | None = None, number: int = 0) -> int:
    """How many tokens are read before the rest has to be said: 1 to length - 1, all alike, or so that the rest is `rate` of them.
    `number` tells the texts of one sequence apart."""
    return length - counts(length, rate, length)[0] if rate is not None else 1 + below(key, SPLIT + number, length - 1)


def chosen(denoisers: Sequence[Denoiser], key: int) -> int:
    """Which denoiser a sequence gets, in proportion to their weights."""
    shares = np.cumsum([denoiser.weight for denoiser in denoisers])
    return int(np.searchsorted(shares, uniform(key, WHICH) * shares[-1], side="right"))


# -- what a model reads -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """What is read in both directions, and what is said after it. Where it is not `closed`, the targets go on where the inputs stop and
    both are without an end. `counted` flags the targets that count in the loss (default: all)."""

    inputs: Ids
    targets: Ids
    closed: bool = True
    counted: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))


def one_window(examples: Sequence[Example], length: int, end: int) -> dict[str, NDArray[np.generic]]:
    """Inputs and targets in one row of `length` positions behind an `end`, for a decoder: `input_ids`, `targets` and `weights`
    (n, length), and `prefix` (n,), how many positions belong to the inputs; the last of them predicts the first target."""
    rows, weights = np.full((len(examples), length + 1), end, np.int64), np.zeros((len(examples), length), np.float32)
    prefix = np.zeros(len(examples), np.int64)
    for row, one in enumerate(examples):
        closing = [end] if one.closed else []
        read = np.concatenate([[end], one.inputs, closing])
        said = np.concatenate([one.targets, closing])
        rows[row, : len(read) + len(said)] = np.concatenate([read, said])
        weights[row, len(read) - 1 : len(read) + len(said) - 1] = _weights(one, len(said))
        prefix[row] = len(read)
    return {"input_ids": rows[:, :-1], "targets": rows[:, 1:], "weights": weights, "prefix": prefix}


def two_rows(examples: Sequence[Example], sizes: tuple[int, int], start: int, end: int) -> dict[str, NDArray[np.generic]]:
    """Inputs for an encoder and targets for a decoder: `input_ids` (n, E) with `lengths` (n,), always with an end, and
    `decoder_input_ids`, `targets` and `weights` (n, D), the first ones the targets moved behind `start`."""
    inputs, shape = np.full((len(examples), sizes[0]), end, np.int64), (len(examples), sizes[1])
    before, targets, weights = np.full(shape, end, np.int64), np.full(shape, end, np.int64), np.zeros(shape, np.float32)
    before[:, 0] = start
    lengths = np.zeros(len(examples), np.int64)
    for row, one in enumerate(examples):
        said = np.concatenate([one.targets, [end] if one.closed else []])
        lengths[row] = len(one.inputs) + 1
        inputs[row, : lengths[row] - 1] = one.inputs
        targets[row, : len(said)] = said
        before[row, 1 : len(said)] = said[:-1]
        weights[row, : len(said)] = _weights(one, len(said))
    return {"input_ids": inputs, "lengths": lengths, "decoder_input_ids": before, "targets": targets, "weights": weights}


def _weights(one: Example, size: int) -> NDArray[np.float32]:
    return one.counted.astype(np.float32) if len(one.counted) else np.ones(size, np.float32)
