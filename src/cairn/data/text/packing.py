"""Packing: from a stream of documents to windows of L + 1 tokens (L inputs, each with the token after it as target).

`joined` lays documents one after the other and cuts the stream every L tokens: each token is a target exactly once per
epoch. `whole` places documents in windows by best fit and cuts only those that are longer than a window
("Fewer Truncations Improve Language Modeling", section 3); what stays empty is padding of weight 0. `complete` takes documents
in their order and leaves out what no longer fits, so that each begins at its beginning ("Metadata Conditioning Accelerates
Language Model Pre-training", appendix A). Tokens of metadata are no targets.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cairn.data.text.tokens import Split


@dataclass(frozen=True)
class Windows:
    """n windows: `tokens` (n, L + 1) int64; `documents` (n, L + 1) int32, equal within a document, -1 for padding;
    `weights` (n, L) float32, what each target counts in the loss."""

    tokens: NDArray[np.int64]
    documents: NDArray[np.int32]
    weights: NDArray[np.float32]


class Packing(Protocol):
    """A way to cut one split into numbered windows."""

    count: int

    def windows(self, indices: NDArray[np.int64]) -> Windows:
        """The windows of these numbers."""
        ...


class Joined:
    """The stream cut every `length` tokens; the last, incomplete window is left out."""

    def __init__(self, split: Split, length: int) -> None:
        self.split, self.length = split, length
        self.count = max(0, len(split.tokens) - 1) // length

    def windows(self, indices: NDArray[np.int64]) -> Windows:
        places = indices[:, None] * self.length + np.arange(self.length + 1)
        numbers = np.searchsorted(self.split.starts, places.astype(np.uint64), side="right")
        documents = (numbers - numbers[:, :1]).astype(np.int32)
        weights = 1 - self.split.is_metadata(places[:, 1:]).astype(np.float32)
        return Windows(self.split.tokens[places].astype(np.int64), documents, weights)


class Whole:
    """Documents uncut where they fit. The plan is made once, in memory proportional to the number of documents."""

    def __init__(self, split: Split, length: int, padding: int) -> None:
        self.split, self.length, self.padding = split, length, padding
        starts = split.starts.astype(np.int64)
        self._pieces, self._bins = self._plan(starts, np.diff(np.append(starts, len(split.tokens))), length + 1)
        self.count = len(self._bins)

    def _plan(self, starts: NDArray[np.int64], lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[Any], list[list[int]]]:
        """The pieces (see `_cut`) and the numbers of those in each window."""
        pieces = _cut(starts, lengths, capacity)
        return pieces, best_fit(pieces[:, 1], capacity)

    def windows(self, indices: NDArray[np.int64]) -> Windows:
        size = (len(indices), self.length + 1)
        tokens, documents = np.full(size, self.padding, np.int64), np.full(size, -1, np.int32)
        weights = np.zeros((len(indices), self.length), np.float32)
        for row, index in enumerate(indices):
            place = 0
            for number, piece in enumerate(self._bins[index]):
                begin, count, begins, ends = self._pieces[piece]
                tokens[row, place : place + count] = self.split.tokens[begin : begin + count]
                documents[row, place : place + count] = number
                weights[row, place : place + count - 1] = ~self.split.is_metadata(np.arange(begin + 1, begin + count))
                if place and not begins:
                    weights[row, place - 1] = 0  # the middle of a document does not follow from what happens to stand before it
                if ends and place + count <= self.length:
                    weights[row, place + count - 1] = 1  # an end-of-text follows, the next document's or padding: worth learning
                place += count
        return Windows(tokens, documents, weights)


class Complete(Whole):
    """Documents in their order, each from its beginning; what no longer fits a window is left out."""

    def _plan(self, starts: NDArray[np.int64], lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[Any], list[list[int]]]:
        sizes, bins, room = np.zeros_like(lengths), list[list[int]](), 0
        for number, length in enumerate(lengths.tolist()):
            if room < 2:  # a window's last place alone teaches nothing
                bins.append([])
                room = capacity
            sizes[number] = min(length, room)
            bins[-1].append(number)
            room -= int(sizes[number])
        return np.stack([starts, sizes, np.ones_like(sizes), sizes == lengths], axis=1), bins


def best_fit(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: items (each at most `capacity`) into bins; returns the item numbers of each bin. Deterministic."""
    bins: list[list[int]] = []
    open_bins: dict[int, list[int]] = {}  # room left -> bins, first opened last
    rooms: list[int] = []  # the keys of open_bins, sorted
    for item in np.argsort(-lengths, kind="stable"):
        need = int(lengths[item])
        at = bisect.bisect_left(rooms, need)
        if at == len(rooms):
            number, room = len(bins), capacity
            bins.append([])
        else:
            room = rooms[at]
            number = open_bins[room].pop()
            if not open_bins[room]:
                del open_bins[room], rooms[at]
        bins[number].append(int(item))
        room -= need
        if room not in open_bins:
            open_bins[room] = []
            bisect.insort(rooms, room)
        open_bins[room].append(number)
    return bins


def make(packing: str, split: Split, length: int, padding: int) -> Packing:
    """The packing of that name over a split."""
    return Joined(split, length) if packing == "joined" else {"whole": Whole, "complete": Complete}[packing](split, length, padding)


def _cut(starts: NDArray[np.int64], lengths: NDArray[np.int64], capacity: int) -> NDArray[Any]:
    """(begin, length, whether a document begins with it, whether one ends) of every piece of at most `capacity` tokens."""
    counts = -(-lengths // capacity)
    which = np.repeat(np.arange(len(lengths)), counts)
    offsets = (np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)) * capacity
    sizes = np.minimum(capacity, lengths[which] - offsets)
    return np.stack([starts[which] + offsets, sizes, offsets == 0, offsets + sizes == lengths[which]], axis=1)
