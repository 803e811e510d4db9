"""One save on its way: what is to be held, the pieces that are still to be copied, and those that wait for the writer.

A capture belongs to three threads: the one that trains waits for pieces, one copies them, one writes what has arrived.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from blake3 import blake3

from cairn.checkpoint.format.layout import TensorSpec
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.parts import Part, local_of
from cairn.checkpoint.saving.ring import Region
from cairn.errors import CairnError

if TYPE_CHECKING:
    from cairn.checkpoint.format.read import Checkpoint

PIECE_BYTES = 8 * 2**20
"""Bytes copied at a time: the interpreter is free in between, and a waiting update gets its tensors soon."""
SMALL_BYTES = 64 * 2**10
"""Tensors up to this size are copied at once when a save is asked for: cheaper than keeping track of them."""

Guard = Literal["version", "blocks"]


class TornError(CairnError):
    """A tensor changed while it was being copied, so that the save was given up."""


@dataclass(frozen=True)
class NamedState:
    """What a checkpoint is to hold: live tensors by stem and name, and small files by name.

    `early` names tensors, as (stem, name), that may change before the next update begins (statistics that a forward pass
    moves): they are copied when the save is asked for.
    """

    groups: Mapping[str, Mapping[str, torch.Tensor]]
    files: Mapping[str, bytes]
    early: Collection[tuple[str, str]] = ()


class Keeping(Protocol):
    """Memory that keeps what is captured: copies go straight to it, and what is also written to disk is written from it."""

    def place(self, stem: str, part: Part) -> torch.Tensor:
        """Host memory for a part, of its shape and dtype."""

    def commit(self) -> None:
        """All parts are there."""

    def abort(self) -> None:
        """They never will be."""


Specs = Mapping[str, Sequence[TensorSpec]]
"""The tensors of a state, by stem."""
Parts = Mapping[str, Sequence[Part]]
"""What one process copies, by stem."""


@dataclass
class Figures:
    """What one save took: bytes of this process, seconds of copying, of waiting before the update, for room in the ring, of writing."""

    path: Path | None
    mode: str
    bytes: int = 0
    copying: float = 0.0
    waiting: float = 0.0
    room: float = 0.0
    writing: float = 0.0
    torn: bool = False


@dataclass(eq=False)
class PendingCopy:
    """A stretch of a tensor on its way: `source` is live memory until `host` holds the copy."""

    stem: str
    part: Part
    source: torch.Tensor
    version: int
    storage: int
    region: Region | None = None
    host: torch.Tensor | None = None
    callback: torch.cuda.Event | None = None


class Capture:
    """One save on its way: which pieces are still to be copied, and which wait for the writer."""

    def __init__(
        self,
        path: Path | None,
        state: NamedState,
        specs: Specs,
        parts: Parts,
        mode: str,
        guard: Guard,
        lineage: Callable[[Checkpoint | None], Lineage],
        published: Callable[[Checkpoint], object] | None,
        keeping: Keeping | None,
    ) -> None:
        self.path, self.state, self.specs, self.mode = path, state, specs, mode
        self.lineage, self.published, self._keeping = lineage, published, keeping
        self.asked = time.perf_counter()
        self.figures = Figures(path, mode)
        self.error: BaseException | None = None
        self.done = threading.Event()
        self.compared = threading.Event()
        """No block is left to compare: what is copied may be published."""
        self.waiting: deque[PendingCopy] = deque()
        self._moments: dict[torch.device, torch.cuda.Event] = {}
        self._last: dict[torch.device, torch.cuda.Event] = {}
        self._changed = threading.Condition()
        self._early: deque[PendingCopy] = deque()
        self._ready: queue.Queue[PendingCopy | None] = queue.Queue()
        self._left: dict[int, int] = {}
        self._checked: list[tuple[Part, torch.Tensor, int, bytes]] = []
        for stem, mine in parts.items():
            for part in mine:
                self._enter(stem, part, local_of(state.groups[stem][part.name]), guard)
        self.ringed = sum(piece.source.nbytes for piece in self.waiting if piece.host is None)
        if not self.waiting:
            self._ready.put(None)
        if not self._checked:
            self.compared.set()

    def __str__(self) -> str:
        return str(self.path) if self.path is not None else "a snapshot in memory"

    def _enter(self, stem: str, part: Part, source: torch.Tensor, guard: Guard) -> None:
        self.figures.bytes += source.nbytes
        kept = self._keeping.place(stem, part) if self._keeping is not None else None
        if source.nbytes <= SMALL_BYTES or (stem, part.name) in self.state.early:
            # Copied here and now; `host` alone is set, there is nothing to wait for.
            piece = PendingCopy(stem, part, source, source._version, 0)
            piece.host = _cloned(source) if kept is None else kept.copy_(source)
            self._early.append(piece)
            return
        storage = storage_of(source)
        places = [host for _, host in _pieces(part, kept)] if kept is not None else []
        for number, (inner, view) in enumerate(_pieces(part, source)):
            self.waiting.append(PendingCopy(stem, inner, view, source._version, storage, host=places[number] if places else None))
            self._left[storage] = self._left.get(storage, 0) + 1
        if source.is_cuda and source.device not in self._moments:
            self._moments[source.device] = torch.cuda.current_stream(source.device).record_event()
        if guard == "blocks":
            first = blake3(f"{self}/{part.name}".encode()).digest()[0] * source.numel() // 256
            self._checked.append((part, source, first, _block(source, first)))

    def moment(self, device: torch.device) -> torch.cuda.Event:
        """When the update was done on this device; copies begin after it."""
        return self._moments[device]

    def pieces(self) -> Iterator[PendingCopy]:
        """The pieces that are still to be copied, those first that somebody waits for; none once the save has failed."""
        while True:
            with self._changed:
                if self.error is not None:
                    self._give_up()
                if not self.waiting:
                    return
                piece = self.waiting.popleft()
            yield piece

    def arrived(self, piece: PendingCopy) -> None:
        """A piece is copied (on a GPU: its copy is queued), and goes to the writer."""
        with self._changed:
            if piece.callback is not None:
                self._last[piece.source.device] = piece.callback
            self._count(piece)
            self._ready.put(piece)
            if not self._left:
                self._ready.put(None)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """What is not copied yet never will be."""
        with self._changed:
            self.error = self.error or error

    def wait(self, storages: set[int] | None) -> float:
        """Until the pieces of these storages (None: all) are copied; returns the seconds that took."""
        if not self._left:
            return self._order_streams()
        began = time.perf_counter()
        with self._changed:
            if storages is not None:
                self.waiting = deque(sorted(self.waiting, key=lambda piece: piece.storage not in storages))
            while self._left if storages is None else any(storage in self._left for storage in storages):
                self._changed.wait()
        self._order_streams()
        return time.perf_counter() - began

    @property
    def copied(self) -> bool:
        """Whether every piece is."""
        return not self._left

    def copied_pieces(self) -> Iterator[PendingCopy]:
        """Pieces in the order of their arrival, to the last one; each is given once."""
        while self._early:
            yield self._early.popleft()
        while (piece := self._ready.get()) is not None:
            yield piece
        self._ready.put(None)

    def keep_or_not(self) -> None:
        """All is copied, or the save has failed: so has what keeps it in memory."""
        if self._keeping is not None:
            for callback in self._last.values():
                callback.synchronize()
            self._keeping.commit() if self.error is None else self._keeping.abort()
            self._keeping = None

    def compare_blocks(self, storages: set[int] | None) -> None:
        """Under the guard 'blocks': notice tensors that changed before they might, in ways that torch does not count."""
        left = []
        for part, source, first, before in self._checked:
            if storages is not None and storage_of(source) not in storages:
                left.append((part, source, first, before))
            elif _block(source, first) != before:
                self.fail(TornError(f"{self}: '{part.name}' changed before the update began; this save was given up."))
        self._checked = left
        if not left:
            self.compared.set()

    def _order_streams(self) -> float:
        """On a GPU the copies are only queued: what the computing streams do next must come after them."""
        for device, callback in self._last.items():
            torch.cuda.current_stream(device).wait_event(callback)
        return 0.0

    def _count(self, piece: PendingCopy) -> None:
        self._left[piece.storage] -= 1
        if not self._left[piece.storage]:
            del self._left[piece.storage]

    def _give_up(self) -> None:
        while self.waiting:
            self._count(self.waiting.popleft())
        if not self._left:
            self._ready.put(None)
        self._changed.notify_all()


def _pieces(part: Part, tensor: torch.Tensor) -> Iterator[tuple[Part, torch.Tensor]]:
    """A part and its tensor in boxes of at most PIECE_BYTES, cut along the first dimension that can be cut."""
    if tensor.nbytes <= PIECE_BYTES:
        yield part, tensor
        return
    axis = next(axis for axis, size in enumerate(part.shape) if size > 1)
    rows = max(1, part.shape[axis] * PIECE_BYTES // tensor.nbytes)
    for first in range(0, part.shape[axis], rows):
        count = min(rows, part.shape[axis] - first)
        offset = tuple(begin + first * (number == axis) for number, begin in enumerate(part.offset))
        shape = tuple(count if number == axis else size for number, size in enumerate(part.shape))
        yield from _pieces(Part(part.name, offset, shape), tensor.narrow(axis, first, count))


def copy_on_host(target: torch.Tensor, source: torch.Tensor) -> None:
    """One thread copies and the interpreter is free meanwhile; torch's own copy would take all computing threads."""
    if source.is_contiguous():
        import numpy as np

        to, of = (tensor.reshape(-1).view(torch.uint8).numpy() for tensor in (target, source))
        np.copyto(to, of)
    else:
        target.copy_(source)


def _cloned(source: torch.Tensor) -> torch.Tensor:
    """A copy in host memory."""
    return source.contiguous().clone() if source.device.type == "cpu" else source.to("cpu", copy=True).contiguous()


def storage_of(local: torch.Tensor) -> int:
    return local.untyped_storage().data_ptr()


def _block(source: torch.Tensor, first: int) -> bytes:
    flat = source.reshape(-1)[first : first + 1024] if source.is_contiguous() else source.flatten()[first : first + 1024]
    return blake3(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes()).digest()
