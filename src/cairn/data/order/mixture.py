"""Mixtures: which source stands at each position of the global order, as a pure function of the position.

Positions go in blocks of 65,536, each with the same whole number of sequences from every source (the weights, rounded to
that many parts). Inside a block the j-th of n sequences of a source falls at a random moment of the j-th n-th part of the
block, so that at every moment each source's count is within two of its exact share. The number drawn from a source before
any position is known in closed form but for one block, and nothing depends on ranks. The weights may change at a
position; the history of all changes is part of the state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cairn.errors import InputError
from cairn.randomness import seed_for, uniform

BLOCK = 65_536


class Mixture:
    """Sources with weights and the history of their changes: `[(first position, {source: weight}), ...]`."""

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        self.names, self.seed = sorted(weights), seed
        self.history: list[tuple[int, dict[str, float]]] = []
        self._kept: dict[tuple[int, int], tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._bases = {0: np.zeros(len(self.names), dtype=np.int64)}
        """Sequences of each source before each entry of the history, as far as anyone has asked. Two threads may fill it with the same values."""
        self.change(0, weights)

    def change(self, position: int, weights: Mapping[str, float]) -> None:
        """Let other weights hold from `position` on. Only the future can change."""
        if set(weights) != set(self.names):
            raise InputError(f"A mixture's sources are fixed ({', '.join(self.names)}); a weight of 0 leaves one out.")
        if any(weight < 0 for weight in weights.values()) or not sum(weights.values()) > 0:
            raise InputError("Mixture weights must not be negative and at least one must be positive.")
        if self.history and position < self.history[-1][0]:
            raise InputError(f"The mixture already changed at position {self.history[-1][0]}; {position} lies before it.")
        self.history = [entry for entry in self.history if entry[0] < position]
        self._known(self._kept, self._bases)
        self.history.append((position, {name: float(weights[name]) for name in self.names}))

    def changed(self, position: int, weights: Mapping[str, float]) -> Mixture:
        """A copy in which `weights` hold from `position` until the next change that is already planned, if there is one."""
        later = [entry for entry in self.history if entry[0] > position]
        result = self.until(position)
        for at, each in [(position, weights), *later]:
            result.change(at, each)
        return result

    def until(self, position: int) -> Mixture:
        """A copy that knows only the changes up to `position`."""
        copy = Mixture.from_json([entry for entry in self.history if entry[0] <= position], self.seed)
        copy._known(self._kept, self._bases)
        return copy

    def _known(self, kept: Mapping[tuple[int, int], tuple[NDArray[np.int64], NDArray[np.int64]]], bases: Mapping[int, NDArray[np.int64]]) -> None:
        """Take over what was computed for the entries of the history as it is now: none of it depends on later ones."""
        count = len(self.history)
        self._kept = {place: value for place, value in kept.items() if place[0] < count}
        self._bases = {segment: base for segment, base in dict(bases).items() if segment < max(1, count)}

    def weights_at(self, position: int) -> dict[str, float]:
        """The weights that hold at a position."""
        return [weights for begin, weights in self.history if begin <= position][-1]

    def draws(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each position the number of its source and how many sequences of that source come before it."""
        positions = np.asarray(positions, dtype=np.int64)
        sources, counts = np.empty_like(positions), np.empty_like(positions)
        segments = np.searchsorted([begin for begin, _ in self.history], positions, side="right") - 1
        for segment in np.unique(segments).tolist():
            begin, weights = self.history[segment]
            base, parts, blocks = self._base(segment), _parts(weights, self.names), (positions - begin) // BLOCK
            for block in np.unique(blocks[segments == segment]).tolist():
                chosen = (segments == segment) & (blocks == block)
                order, rank = self._block(segment, block)
                places = positions[chosen] - begin - block * BLOCK
                sources[chosen] = order[places]
                counts[chosen] = base[order[places]] + block * parts[order[places]] + rank[places]
        return sources, counts

    def cursor(self, position: int) -> dict[str, int]:
        """Sequences drawn from each source before `position`."""
        segment = max(0, sum(begin < position for begin, _ in self.history) - 1)
        drawn = self._base(segment) + self._counted(segment, position - self.history[segment][0])
        return dict(zip(self.names, drawn.tolist(), strict=True))

    def to_json(self) -> list[list[Any]]:
        """The history as plain values."""
        return [[position, weights] for position, weights in self.history]

    @classmethod
    def from_json(cls, history: Sequence[Sequence[Any]], seed: int) -> Mixture:
        """The mixture whose `to_json` gave `history`."""
        mixture = cls(history[0][1], seed)
        for position, weights in history[1:]:
            mixture.change(position, weights)
        return mixture

    def _base(self, segment: int) -> NDArray[np.int64]:
        """Sequences of each source before an entry of the history."""
        for number in range(1, segment + 1):
            if number not in self._bases:
                self._bases[number] = self._bases[number - 1] + self._counted(number - 1, self.history[number][0] - self.history[number - 1][0])
        return self._bases[segment]

    def _counted(self, segment: int, length: int) -> NDArray[np.int64]:
        """Sequences of each source among the first `length` of a segment."""
        block, rest = divmod(length, BLOCK)
        order, _ = self._block(segment, block)
        return block * _parts(self.history[segment][1], self.names) + np.bincount(order[:rest], minlength=len(self.names))

    def _block(self, segment: int, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The sources of a block's positions, and how many of the same source stand before each inside the block."""
        kept = self._kept.get((segment, block))
        if kept is None:
            parts = _parts(self.history[segment][1], self.names)
            slots, rank = np.repeat(np.arange(len(parts)), parts), np.concatenate([np.arange(n) for n in parts])
            moments = (rank + uniform(seed_for(self.seed, "mixture", segment, block), np.arange(BLOCK))) / parts[slots]
            at = np.argsort(moments, kind="stable")
            kept = slots[at], rank[at]
            self._kept = dict([*self._kept.items()][-1:]) | {(segment, block): kept}  # this block and the one before
        return kept


def _parts(weights: Mapping[str, float], names: Sequence[str]) -> NDArray[np.int64]:
    """How many of a block's positions each source has: largest remainders, at least one for every positive weight."""
    values = np.array([weights[name] for name in names], dtype=np.float64)
    exact = values / values.sum() * BLOCK
    parts = np.maximum(np.floor(exact).astype(np.int64), (values > 0).astype(np.int64))
    remainders = np.argsort(parts - exact, kind="stable")
    for index in range(BLOCK - int(parts.sum())):
        parts[remainders[index % len(parts)]] += 1
    while parts.sum() > BLOCK:
        parts[np.argmax(parts)] -= 1
    return parts
