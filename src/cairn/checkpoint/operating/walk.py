"""Walking through several checkpoints side by side: the same items of the same tensor of each, a small piece at a time.

A piece fits a processor's cache, so that a method's many elementwise steps cost little more than the reading. Whatever
is summed over a walk is summed in the order of its pieces: the number of threads changes no bit.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from cairn.checkpoint.format.layout import TensorSpec

if TYPE_CHECKING:
    from cairn.checkpoint.format.read import Checkpoint

PIECE_ITEMS = 2**17
"""Items of one tensor that are in hand at a time: 512 KiB in float32. A multiple of eight, so that masks of bits end with the piece."""

T = TypeVar("T")


@dataclass(frozen=True)
class TensorSlice:
    """Items `begin` to `begin + size` of the tensor `name`: one flat float32 (or float64) tensor per checkpoint.

    The tensors are buffers that the next piece overwrites; a method must not change them nor keep them.
    """

    name: str
    begin: int
    inputs: Sequence[torch.Tensor]

    @property
    def size(self) -> int:
        return self.inputs[0].numel()


class Walk:
    """The floating-point tensors `specs` of `parents`, piece by piece, by one thread or several.

    They are weights, or what lies in the files of another `stem`, such as the optimizer's state.
    """

    def __init__(self, parents: Sequence[Checkpoint], specs: Sequence[TensorSpec], threads: int = 1, *, stem: str = "model") -> None:
        self.parents, self.threads, self.stem = parents, threads, stem
        self.specs = [spec for spec in specs if spec.dtype in ("F64", "F32", "F16", "BF16")]
        self.items = sum(math.prod(spec.shape) for spec in self.specs)
        self._buffers = threading.local()

    def pieces(self) -> Iterator[TensorSlice]:
        """All pieces in order, in the calling thread."""
        for place in self._places():
            yield self._read(*place)

    def map(self, function: Callable[[TensorSlice], T]) -> Iterator[T]:
        """What `function` makes of each piece, in the order of the pieces; only a few are in hand at any time."""
        if self.threads == 1:
            yield from map(function, self.pieces())
            return
        with workers(self.threads) as pool:
            waiting: deque[Future[T]] = deque()
            for place in self._places():
                waiting.append(pool.submit(self._made, function, place))
                if len(waiting) > 2 * self.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _made(self, function: Callable[[TensorSlice], T], place: tuple[str, int, int]) -> T:
        return function(self._read(*place))

    def sample(self, items: int, run: int = 256) -> Iterator[TensorSlice]:
        """About `items` items in short runs spread evenly over the whole walk, always the same ones."""
        step = max(run, self.items * run // max(items, 1))
        ahead = step // 2  # the next run begins this many items further on
        for spec in self.specs:
            count = math.prod(spec.shape)
            while ahead < count:
                yield self._read(spec.name, ahead, min(ahead + run, count))
                ahead += step
            ahead -= count

    def _places(self) -> Iterator[tuple[str, int, int]]:
        for spec in self.specs:
            count = math.prod(spec.shape)
            for begin in range(0, count, PIECE_ITEMS):
                yield spec.name, begin, min(begin + PIECE_ITEMS, count)

    def _read(self, name: str, begin: int, end: int) -> TensorSlice:
        inputs = []
        for number, parent in enumerate(self.parents):
            lazy = parent.folder(self.stem)[name]
            inputs.append(widened(lazy.flat(begin, end, self._buffer(number, lazy.dtype))))
        return TensorSlice(name, begin, inputs)

    def _buffer(self, number: int, dtype: torch.dtype) -> torch.Tensor:
        key = f"{number} {dtype}"
        if not hasattr(self._buffers, key):
            setattr(self._buffers, key, torch.empty(PIECE_ITEMS, dtype=dtype))
        buffer: torch.Tensor = getattr(self._buffers, key)
        return buffer


@contextmanager
def workers(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that each compute on one core: torch's own threads inside them would fight over the same cores."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="cairn-walk", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def cores() -> int:
    """How many threads are worth their memory: as many as this process may use cores, at most eight."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, usable)


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """In the precision in which sums are made: float32, or float64 where the tensor already is."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
