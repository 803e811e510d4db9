"""The feed: which sample stands at each position of a run's global order, as a pure function.

`samples(positions)` depends on the seed, the sources and the mixture's history alone: not on ranks, workers, micro-batches
or on how often a run was resumed. The whole state is one position and that history. What a sample is, a field's own feed says.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from cairn.data.order.mixture import Mixture
from cairn.errors import InputError, ResumeError
from cairn.randomness import bits, permutation, seed_for

T = TypeVar("T")


class FeedSource(Protocol):
    """A source of samples: its name, its weight in the mixture, and, if not all of it is to be read, how many samples."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...

    @property
    def subset(self) -> int | None: ...


class Feed(ABC):
    """Samples from several sources in one global order."""

    noun: ClassVar[str] = "samples"
    """What samples are called in messages."""
    more: ClassVar[str] = "add data"
    """What helps where there are none."""
    held_out_remedy: ClassVar[str] = "train with a larger data.held_out or with more data"
    """What helps where none are held out."""
    sample_units = 1
    """Units of one sample: the tokens of a sequence, or 1."""
    filtered = False
    """Whether some samples may be left out of the loss, by their `kept`."""

    def __init__(self, sources: Sequence[Any], seed: int) -> None:
        """`sources` are `FeedSource`s."""
        # By name, so that the order in which a recipe lists its sources decides nothing.
        self.sources = sorted(sources, key=lambda source: source.name)
        self.seed = seed
        self.mixture = Mixture({source.name: source.weight for source in self.sources}, seed)
        """Never changed in place: a thread that prepares samples goes on with the one that it found."""

    @abstractmethod
    def samples(self, positions: NDArray[np.int64]) -> Any:
        """The samples at these positions of the global order: an object with `source` (n,), the number of each sample's source, `kept` (n,),
        whether each counts in the loss, or None where all do, and whatever else the field gives. A source that is used up begins again in
        another order."""

    @abstractmethod
    def evenly(self, samples: int, split: Literal["train", "held_out"]) -> Any:
        """Fixed samples of a split: from each source in equal number, evenly spaced over it."""

    @abstractmethod
    def digests(self) -> dict[str, str]:
        """What identifies the data of each source."""

    @property
    @abstractmethod
    def epoch_samples(self) -> dict[str, int]:
        """Samples of one pass over each source, or over what is read of it."""

    def held_out(self, samples: int = 256) -> Any:
        """Fixed held-out samples, always the same. Raises `InputError` if no source has a held-out part."""
        return self.evenly(samples, "held_out")

    def keys(self, positions: NDArray[np.int64]) -> NDArray[np.uint64]:
        """A random number of each sample's own, from (seed, position), out of which choices about it are drawn."""
        return bits(seed_for(self.seed, "sequence"), positions)

    def numbers(self, source: FeedSource, name: str, count: int, draws: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of a source's `count` samples its n-th draws are. A subset is what the first epoch of the whole would begin with."""
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

    def spread(self, counts: Sequence[int], samples: int, split: Literal["train", "held_out"]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and number of fixed samples of a split, of which the sources have so many: from each in equal number, evenly spaced."""
        each = max(1, samples // len(counts))
        spread = [np.unique(np.linspace(0, count - 1, min(each, count)).astype(np.int64)) if count else np.zeros(0, np.int64) for count in counts]
        sources = np.repeat(np.arange(len(counts)), [len(numbers) for numbers in spread])
        if not len(sources):
            if split == "train":
                raise InputError(f"The data give none of the {self.noun} that are asked for; {self.more}.")
            raise InputError(f"No held-out {self.noun} are there to measure on; {self.held_out_remedy}.")
        return sources, np.concatenate(spread)

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
        return {"stores": self.digests(), "mixture": mixture, "cursor": self.mixture.cursor(position)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back the mixture's history. Raises `ResumeError` if these are not the data that the state speaks of."""
        here = self.digests()
        for name, digest in state["stores"].items():
            if here.get(name) != digest:
                problem = "has other contents than when the run began" if name in here else "is not there"
                raise ResumeError(
                    f"The source '{name}' {problem}, so the run cannot go on exactly; restore the data, or `cairn fork` into a new run on the data as they are."
                )
        self.mixture = Mixture.from_json(state["mixture"], self.seed)


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
