"""The feed: which sequence stands at each position of a run's global order, as a pure function.

`samples(positions)` depends on the seed, the sources and the mixture's history alone: not on ranks, workers, micro-batches
or on how often a run was resumed. The whole state is one position and that history.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from cairn.data.filters import Filter
from cairn.data.order.mixture import Mixture
from cairn.data.text import packing as packings
from cairn.data.text.packing import Windows
from cairn.data.text.tokens import TokenStore
from cairn.errors import InputError, ResumeError
from cairn.randomness import bits, permutation, seed_for

T = TypeVar("T")


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

    def distinct(self) -> NDArray[np.int64]:
        """The tokens, with padding as negative numbers of which no two in a sequence are equal."""
        if self.documents is None:
            return self.tokens
        return np.where(self.documents < 0, -1 - np.arange(self.tokens.shape[1]), self.tokens)


class Feed:
    """Sequences of `sequence_length` tokens from several sources in one global order."""

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
        # By name, so that the order in which a recipe lists its sources decides nothing.
        self.sources = sorted(sources, key=lambda source: source.name)
        self.sequence_length, self.seed, self.documents = sequence_length, seed, documents
        self._packing, self._filters = packing, filters
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
        self.mixture = Mixture({source.name: source.weight for source in self.sources}, seed)
        """Never changed in place: a thread that prepares samples goes on with the one that it found."""

    @property
    def epoch_tokens(self) -> dict[str, int]:
        """Tokens of one pass over each source, or over what is read of it."""
        return {s.name: (s.subset or packed.count) * self.sequence_length for s, packed in zip(self.sources, self._train, strict=True)}

    def samples(self, positions: NDArray[np.int64]) -> Samples:
        """The sequences at these positions of the global order. A source that is used up begins again in another order."""
        positions = np.asarray(positions, dtype=np.int64)
        keys = bits(seed_for(self.seed, "sequence"), positions)
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
        return found

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
            window[mine] = self._windows(source, f"{source.name}{suffix}", packed[number].count, draws[mine])
        return self._gather(packed, sources, window, keys)

    def _windows(self, source: SourceSpec, name: str, count: int, draws: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of a source's `count` windows its n-th draws are. A subset is what the first epoch of the whole would begin with."""
        size = min(source.subset or count, count)
        epochs, places = np.divmod(draws, size)
        chosen = np.empty(len(draws), dtype=np.int64)
        for epoch in np.unique(epochs):
            seed, mine = seed_for(self.seed, "order", name, int(epoch)), epochs == epoch
            if size == count or epoch == 0:
                chosen[mine] = permutation(seed, count, places[mine])
            else:
                chosen[mine] = permutation(seed_for(self.seed, "order", name, 0), count, permutation(seed, size, places[mine]))
        return chosen

    def held_out(self, sequences: int = 256) -> Samples:
        """Fixed held-out windows, always the same. Raises `InputError` if no source has a held-out part of one sequence."""
        return self.evenly(sequences, "held_out")

    def evenly(self, sequences: int, split: Literal["train", "held_out"]) -> Samples:
        """Fixed windows of a split: from each source in equal number, evenly spaced over it."""
        packed = [self._packed(source, split) for source in self.sources]
        each = max(1, sequences // len(packed))
        spread = [np.unique(np.linspace(0, p.count - 1, min(each, p.count)).astype(np.int64)) if p.count else np.zeros(0, np.int64) for p in packed]
        sources = np.repeat(np.arange(len(packed)), [len(windows) for windows in spread])
        if not len(sources):
            raise InputError(f"No source has a {split.replace('_', '-')} part of at least one sequence; raise data.held_out or add documents.")
        return self._gather(packed, sources, np.concatenate(spread), bits(seed_for(0, split), np.arange(len(sources))))

    def change(self, position: int, weights: Mapping[str, float]) -> None:
        """Mix the sources by `weights` from `position` on. Raises `InputError` for weights that make no mixture."""
        self.mixture = self.mixture.changed(position, weights)

    def plan(self, position: int, changes: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Put these changes, all after `position`, in the place of whatever was planned for later than it."""
        mixture = self.mixture.until(position)
        for at, weights in changes:
            mixture.change(at, weights)
        self.mixture = mixture

    def state(self, position: int) -> dict[str, Any]:
        """Plain values that identify the data and say how they were mixed up to `position` and how far each source has been read.
        What is planned for later is not state: the recipe says it."""
        mixture = self.mixture.until(position).to_json()
        return {"stores": self._digests(), "mixture": mixture, "cursor": self.mixture.cursor(position)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back the mixture's history. Raises `ResumeError` if these are not the data that the state speaks of."""
        here = self._digests()
        for name, digest in state["stores"].items():
            if here.get(name) != digest:
                problem = "has other contents than when the run began" if name in here else "is not there"
                raise ResumeError(
                    f"The source '{name}' {problem}, so the run can not go on exactly; "
                    "restore the data, or `cairn fork` into a new run on the data as they are."
                )
        self.mixture = Mixture.from_json(state["mixture"], self.seed)

    def _digests(self) -> dict[str, str]:
        """What identifies the data of each source."""
        found = {source.name: source.store.digest for source in self.sources}
        return found | {f"{source.name}/plain": source.after.digest for source in self.sources if source.after is not None}

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


class Prefetcher(Generic[T]):
    """Computes `make(item)` for each item on a thread of its own, `ahead` results in advance; iterate inside the context."""

    def __init__(self, items: Iterable[int], make: Callable[[int], T], ahead: int = 2) -> None:
        self._results: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=ahead)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(items, make), name="cairn-feed", daemon=True)

    def _work(self, items: Iterable[int], make: Callable[[int], T]) -> None:
        try:
            for item in items:
                if not self._offer((make(item), None)):
                    return
            self._offer((None, StopIteration()))
        except BaseException as error:  # carried to the thread that consumes, which raises it
            self._offer((None, error))

    def _offer(self, result: tuple[T | None, BaseException | None]) -> bool:
        while not self._stopped.is_set():
            try:
                self._results.put(result, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[T]:
        while True:
            value, error = self._results.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield value  # type: ignore[misc]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        self._thread.join()
