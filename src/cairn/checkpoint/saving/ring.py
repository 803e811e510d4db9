"""A ring of host memory in which captured bytes wait for the thread that writes them.

Regions are handed out in order and given back in any order; room is made again only from the oldest on, so that a region
is always one stretch of memory. A request for more than is free waits: that is the back-pressure of saving.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ALIGNMENT = 64


@dataclass(eq=False)
class Region:
    """`size` bytes from `begin`; with `free` it may be overwritten as soon as all older ones are free too."""

    begin: int
    size: int
    free: bool = False

    @property
    def end(self) -> int:
        return self.begin + -(-self.size // ALIGNMENT) * ALIGNMENT


class Ring:
    """`capacity` bytes of host memory, page-locked where a GPU copies into it. Any thread may take and give back."""

    def __init__(self, capacity: int, *, pinned: bool = False) -> None:
        self.capacity = max(-(-capacity // ALIGNMENT) * ALIGNMENT, ALIGNMENT)
        self._memory = _allocate(self.capacity, pinned)
        self._live: deque[Region] = deque()
        self._changed = threading.Condition()
        self.waited = 0.0
        """Seconds for which takers have waited for room."""
        self.peak = 0
        """Most bytes that were live at once, gaps at the end of the memory included."""

    def take(self, size: int) -> Region:
        """A free region of `size` bytes, as soon as there is one. Raises `ValueError` for more than the capacity."""
        if size > self.capacity:
            raise ValueError(f"{size} bytes do not fit a ring of {self.capacity}")
        began = time.perf_counter()
        with self._changed:
            while (begin := self._place(size)) is None:
                self._changed.wait()
            region = Region(begin, size)
            self._live.append(region)
            self.peak = max(self.peak, self._used())
        self.waited += time.perf_counter() - began
        return region

    def give_back(self, region: Region) -> None:
        """The bytes of a region are no longer needed."""
        with self._changed:
            region.free = True
            while self._live and self._live[0].free:
                self._live.popleft()
            self._changed.notify_all()

    def view(self, region: Region) -> torch.Tensor:
        """The bytes of a region, flat uint8."""
        return self._memory[region.begin : region.begin + region.size]

    def _place(self, size: int) -> int | None:
        if not self._live:
            return 0
        tail, head = self._live[0].begin, self._live[-1].end
        if self._live[-1].begin < tail:  # wrapped: free is what lies between the newest and the oldest
            return head if head + size <= tail else None
        if head + size <= self.capacity:
            return head
        return 0 if size <= tail else None

    def _used(self) -> int:
        tail, head = self._live[0].begin, self._live[-1].end
        return head - tail if self._live[-1].begin >= tail else self.capacity - tail + head


def _allocate(size: int, pinned: bool) -> torch.Tensor:
    import torch

    if pinned:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            warnings.warn(f"{size} bytes of page-locked memory are not to be had ({error}); copies from the GPU will be slower.", stacklevel=2)
    return torch.empty(size, dtype=torch.uint8)
