"""The feed of text: windows of tokens from packed documents in one global order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from cairn.data.filters import Filter
from cairn.data.order.feed import Feed
from cairn.data.text import packing as packings
from cairn.data.text.packing import Windows
from cairn.data.text.tokens import TokenStore
from cairn.errors import InputError
from cairn.randomness import bits, seed_for


@dataclass(frozen=True)
class SourceSpec:
    """One source: a prepared store under a name, with its weight in the mixture and, if not all of it is to be read, how many sequences."""

    name: str
    store: TokenStore
    weight: float = 1.0
    subset: int | None = None
    after: TokenStore | None = None
    """What it reads from the feed's `switch` on, from its beginning."""


@dataclass(frozen=True)
class Samples:
    """n sequences: `tokens` (n, L + 1) int64; `documents` (n, L + 1) int32 or None if attention may cross documents;
    `weights` (n, L) float32; `source` (n,) and `window` (n,): where each comes from; `keys` (n,) uint64: a random number of each
    sequence's own, from (seed, position), out of which an objective draws its choices."""

    tokens: NDArray[np.int64]
    documents: NDArray[np.int32] | None
    weights: NDArray[np.float32]
    source: NDArray[np.int64]
    window: NDArray[np.int64]
    keys: NDArray[np.uint64] | None = None
    kept: NDArray[np.bool_] | None = None
    """Whether each counts in the loss (n,); None: all do."""

    def distinct(self) -> NDArray[np.int64]:
        """The tokens, with padding as negative numbers of which no two in a sequence are equal."""
        if self.documents is None:
            return self.tokens
        return np.where(self.documents < 0, -1 - np.arange(self.tokens.shape[1]), self.tokens)


class TextFeed(Feed):
    """Sequences of `sequence_length` tokens from several sources in one global order."""

    noun: ClassVar[str] = "sequences"
    more: ClassVar[str] = "add text, or make the sequences shorter"
    held_out_remedy: ClassVar[str] = (
        "name a text to measure on (corpus=NAME_OR_PATH), or train with a larger data.held_out, more documents (a separator cuts files into them) "
        "or a smaller data.sequence_length"
    )

    def __init__(
        self,
        sources: Sequence[SourceSpec],
        sequence_length: int,
        seed: int,
        *,
        packing: Literal["joined", "whole", "complete"] = "joined",
        documents: Literal["attend", "mask"] = "attend",
        switch: int | None = None,
        filters: Sequence[Filter] = (),
    ) -> None:
        """Training sequences that one of the `filters` does not keep have weight 0. Raises `InputError` if a source holds less than one sequence."""
        super().__init__(sources, seed)
        self.sequence_length, self.sample_units, self.documents = sequence_length, sequence_length, documents
        self._packing, self._filters, self.filtered = packing, filters, bool(filters)
        self._train = [self._packed(source, "train") for source in self.sources]
        for source, packed in zip(self.sources, self._train, strict=True):
            if source.subset is not None and not 0 < source.subset <= packed.count:
                raise InputError(f"The source '{source.name}' has {packed.count} sequences of {sequence_length} tokens; a subset of {source.subset} is none.")
            if packed.count == 0:
                raise InputError(f"The source '{source.name}' has {len(source.store.train.tokens)} tokens, less than one sequence of {sequence_length}.")
        self.switch = switch
        """The position from which on sources read their second stores; None: never."""
        self._after = [self._packed(source, "train", source.after) for source in self.sources] if switch is not None else []
        if any(packed.count == 0 for packed in self._after):
            raise InputError("A source has no whole sequence left for the cooldown; raise data.metadata.reserved or add documents.")
        self._before: NDArray[np.int64] | None = None

    @property
    def epoch_samples(self) -> dict[str, int]:
        return {s.name: s.subset or packed.count for s, packed in zip(self.sources, self._train, strict=True)}

    @property
    def epoch_tokens(self) -> dict[str, int]:
        """Tokens of one pass over each source, or over what is read of it."""
        return {name: count * self.sequence_length for name, count in self.epoch_samples.items()}

    def samples(self, positions: NDArray[np.int64]) -> Samples:
        positions = np.asarray(positions, dtype=np.int64)
        keys = self.keys(positions)
        sources, draws = self.mixture.draws(positions)
        late = positions >= self.switch if self.switch is not None else np.zeros(len(positions), bool)
        if not late.any():
            found = self._drawn(self._train, sources, draws, keys, "")
        else:
            draws = draws - np.where(late, self._counts_at_switch()[sources], 0)
            kinds = [(rows, packed, suffix) for rows, packed, suffix in ((~late, self._train, ""), (late, self._after, "/plain")) if rows.any()]
            found = _joined([(rows, self._drawn(packed, sources[rows], draws[rows], keys[rows], suffix)) for rows, packed, suffix in kinds])
        for each in self._filters:
            found.weights[~each.keeps(found.distinct())] = 0
        return replace(found, kept=np.asarray(found.weights.any(axis=1))) if self._filters else found

    def evenly(self, samples: int, split: Literal["train", "held_out"]) -> Samples:
        packed = [self._packed(source, split) for source in self.sources]
        sources, window = self.spread([each.count for each in packed], samples, split)
        return self._gather(packed, sources, window, bits(seed_for(0, split), np.arange(len(sources))))

    def digests(self) -> dict[str, str]:
        found = {source.name: source.store.digest for source in self.sources}
        return found | {f"{source.name}/plain": source.after.digest for source in self.sources if source.after is not None}

    def _counts_at_switch(self) -> NDArray[np.int64]:
        """Sequences drawn from each source before the switch, which no later change of the mixture alters."""
        if self._before is None:
            counts = self.mixture.cursor(self.switch or 0)
            self._before = np.array([counts[source.name] for source in self.sources])
        return self._before

    def _drawn(
        self, packed: Sequence[packings.Packing], sources: NDArray[np.int64], draws: NDArray[np.int64], keys: NDArray[np.uint64], suffix: str
    ) -> Samples:
        """The n-th draws from their sources."""
        window = np.empty_like(draws)
        for number, source in enumerate(self.sources):
            mine = sources == number
            window[mine] = self.numbers(source, f"{source.name}{suffix}", packed[number].count, draws[mine])
        return self._gather(packed, sources, window, keys)

    def _packed(self, source: SourceSpec, split: Literal["train", "held_out"], store: TokenStore | None = None) -> packings.Packing:
        padding = source.store.meta["end_of_text"]
        return packings.make(self._packing, getattr(store or source.store, split), self.sequence_length, padding)

    def _gather(self, packed: Sequence[packings.Packing], sources: NDArray[np.int64], window: NDArray[np.int64], keys: NDArray[np.uint64]) -> Samples:
        size = (len(sources), self.sequence_length + 1)
        found = Windows(np.empty(size, np.int64), np.empty(size, np.int32), np.empty((size[0], size[1] - 1), np.float32))
        for number in np.unique(sources):
            mine = sources == number
            part = packed[number].windows(window[mine])
            found.tokens[mine], found.documents[mine], found.weights[mine] = part.tokens, part.documents, part.weights
        masked = self.documents == "mask" or self._packing != "joined"
        return Samples(found.tokens, found.documents if masked else None, found.weights, sources, window, keys)


def _joined(parts: Sequence[tuple[NDArray[np.bool_], Samples]]) -> Samples:
    """Samples of several kinds, each of the rows where its mask is true, as one."""

    def whole(key: str) -> Any:
        first = getattr(parts[0][1], key)
        if first is None:
            return None
        found = np.empty((len(parts[0][0]), *first.shape[1:]), first.dtype)
        for rows, samples in parts:
            found[rows] = getattr(samples, key)
        return found

    return Samples(**{field.name: whole(field.name) for field in fields(Samples)})
