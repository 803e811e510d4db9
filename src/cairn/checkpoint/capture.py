"""Saving without stalling: state is copied in the background while the next gradient is computed.

Weights and moments do not change from the end of one update to the start of the next. In that window a thread copies
them, piece by piece, into a ring of host memory, and another thread writes what has arrived. Training waits in two
places only: just before the next update, for copies that are not made yet (never for the disk, unless the ring is full),
and at the end of the run. ("DataStates-LLM: Lazy Asynchronous Checkpointing", section 4)

    saver = Background()
    saver.save(path, State(groups, files), lineage)    # returns at once
    ...                                                # forward and backward of the next step
    saver.before_update()                              # must stand before anything changes a captured tensor
    saver.close()                                      # everything asked for is on disk
"""

from __future__ import annotations

import math
import queue
import statistics
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import torch
from blake3 import blake3

from cairn.checkpoint.layout import TensorSpec
from cairn.checkpoint.lineage import Lineage
from cairn.checkpoint.parts import Part, local_of, owners, part_of
from cairn.checkpoint.peers import Peers
from cairn.checkpoint.place import place
from cairn.checkpoint.ring import Region, Ring
from cairn.checkpoint.write import Writer, spec_of
from cairn.errors import CairnError

if TYPE_CHECKING:
    from cairn.checkpoint.read import Checkpoint

PIECE_BYTES = 8 * 2**20
"""Bytes copied at a time: the interpreter is free in between, and a waiting update gets its tensors soon."""
SMALL_BYTES = 64 * 2**10
"""Tensors up to this size are copied at once when a save is asked for: cheaper than keeping track of them."""
TRIALS = 3
"""Saves of each mode that `auto` times before it decides."""

Mode = Literal["lazy", "eager", "auto"]
Guard = Literal["version", "blocks"]


class TornError(CairnError):
    """A tensor changed while it was being copied, so that the save was given up."""


@dataclass(frozen=True)
class State:
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
class _Piece:
    """A stretch of a tensor on its way: `source` is live memory until `host` holds the copy."""

    stem: str
    part: Part
    source: torch.Tensor
    version: int
    storage: int
    region: Region | None = None
    host: torch.Tensor | None = None
    event: torch.cuda.Event | None = None


class Background:
    """Saves one checkpoint after the other from two threads; the calls of one run come from one thread."""

    def __init__(
        self,
        peers: Peers | None = None,
        planning: Peers | None = None,
        *,
        mode: Mode = "auto",
        buffer: int | None = None,
        spare: float = 1.1,
        guard: Guard = "version",
    ) -> None:
        """`peers` are the processes that write together, for the writing thread alone; `planning` the same ones for the
        caller's thread. `buffer` bytes of host memory hold copies on their way, by default `spare` times the state of this
        process. `guard`: 'version' notices changes that torch counts, 'blocks' also compares a block of every tensor."""
        self._peers, self._planning = peers or Peers(), planning or Peers()
        self._buffer, self._spare, self._guard = buffer, spare, guard
        self._pace = _Pace(mode)
        self._ring: Ring | None = None
        self._known: tuple[Any, Specs, Parts] | None = None
        self._current: _Capture | None = None
        self._pending: deque[_Capture] = deque()
        self._error: BaseException | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.figures: list[Figures] = []
        self.newest: Checkpoint | None = None
        """The last checkpoint that was published here; the parent of the next one if it is set before."""
        self._copies: queue.Queue[_Capture | None] = queue.Queue()
        self._writes: queue.Queue[_Capture | None] = queue.Queue()
        self._threads = [
            threading.Thread(target=self._work, args=(self._copies, self._copy), name="cairn-copy", daemon=True),
            threading.Thread(target=self._work, args=(self._writes, self._write), name="cairn-save", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # -- the caller's thread --------------------------------------------------------------------------------------

    def save(
        self,
        path: str | Path | None,
        state: State,
        lineage: Callable[[Checkpoint | None], Lineage],
        published: Callable[[Checkpoint], object] | None = None,
        keep: Callable[[Specs, Parts], Keeping | None] | None = None,
    ) -> threading.Event:
        """Ask for a checkpoint of the state as it stands; returns as soon as what can not wait is copied.

        `lineage` is asked with the checkpoint published before, `published` told when this one is; both on another thread.
        `keep` may give memory that keeps what is captured, with a `path` beside the disk and with None instead of it. The
        event that is returned is set when nothing of this save is under way any more. Raises what went wrong in an earlier one.
        """
        self.check()
        self.before_update()  # one set of tensors is captured at a time
        specs, parts = self._layout(state)
        keeping = keep(specs, parts) if keep is not None else None
        mode = self._pace.choose()
        capture = _Capture(place(path) if path is not None else None, state, specs, parts, mode, self._guard, lineage, published, keeping)
        if path is None and keeping is None:
            capture.done.set()
            return capture.done
        self._ring = self._fitting(capture)
        while self._pending and self._pending[0].done.is_set():
            self._pending.popleft()
        self._current = capture
        self._pending.append(capture)
        self._copies.put(capture)
        self._writes.put(capture)
        if mode == "eager":
            capture.wait(None)
        return capture.done

    def before_update(self, tensors: Iterable[torch.Tensor] | None = None) -> float:
        """Wait until the captured tensors (of `tensors`, or all) are copied and may change; returns the seconds waited."""
        capture = self._current
        if capture is None:
            return 0.0
        storages = None if tensors is None else {_storage(local_of(tensor)) for tensor in tensors}
        waited = capture.wait(storages)
        capture.figures.waiting += waited
        capture.compare_blocks(storages)
        if storages is None or capture.copied:
            capture.keep_or_not()
            self._pace.took(capture.mode, time.perf_counter() - capture.asked)
            self._current = None
        return waited

    def check(self) -> None:
        """Raise what went wrong in a save, if something did. A save that was torn is counted, not raised."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    @property
    def failed(self) -> bool:
        """Whether `check` would raise."""
        return self._error is not None

    def finish(self) -> None:
        """Wait until everything that was asked for is published. Raises what went wrong."""
        self.before_update()
        while self._pending:
            self._pending[0].done.wait()
            self._pending.popleft()
        self.check()

    def close(self) -> None:
        """`finish`, and let the threads and the memory go."""
        try:
            self.finish()
        finally:
            for jobs in (self._copies, self._writes):
                jobs.put(None)
            self._ring = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _layout(self, state: State) -> tuple[Specs, Parts]:
        """The tensors, and what this process copies of them; found again only when names or shapes have changed, which all processes
        see alike."""
        key = [(stem, name, tensor.shape, tensor.dtype) for stem, tensors in state.groups.items() for name, tensor in tensors.items()]
        if self._known is None or self._known[0] != key:
            groups = {stem: tensors for stem, tensors in state.groups.items() if tensors}
            specs = {stem: [spec_of(name, tensor) for name, tensor in tensors.items()] for stem, tensors in groups.items()}
            held = {stem: [part_of(name, tensor) for name, tensor in tensors.items()] for stem, tensors in groups.items()}
            everyone = self._planning.gather(held)
            parts = {
                stem: owners([process[stem] for process in everyone], {spec.name: spec.shape for spec in listed})[self._planning.rank]
                for stem, listed in specs.items()
            }
            self._known = key, specs, parts
        return self._known[1:]

    def _fitting(self, capture: _Capture) -> Ring:
        """The ring, made anew when the state has outgrown it."""
        largest = max((piece.source.nbytes for piece in capture.waiting), default=0)
        wanted = self._buffer if self._buffer is not None else math.ceil(self._spare * capture.ringed)
        if self._ring is not None and self._ring.capacity >= max(wanted, largest):
            return self._ring
        if self._buffer is not None and self._buffer < capture.ringed:
            warnings.warn(
                f"{self._buffer} bytes for copies on their way are less than the state of this process ({capture.ringed} bytes): "
                "updates will wait for the disk.",
                stacklevel=3,
            )
        while len(self._pending) > 0:  # nobody may still hold a region of the old one
            self._pending[0].done.wait()
            self._pending.popleft()
        return Ring(max(wanted, largest, 1), pinned=any(piece.source.is_cuda for piece in capture.waiting))

    # -- the two threads ------------------------------------------------------------------------------------------

    def _work(self, jobs: queue.Queue[_Capture | None], action: Callable[[_Capture], None]) -> None:
        while (capture := jobs.get()) is not None:
            action(capture)

    def _copy(self, capture: _Capture) -> None:
        assert self._ring is not None
        ring = self._ring
        for piece in capture.pieces():
            if piece.host is None:
                before = ring.waited
                piece.region = ring.take(piece.source.nbytes)
                capture.figures.room += ring.waited - before
                piece.host = ring.view(piece.region).view(piece.source.dtype).view(piece.source.shape)
            began = time.perf_counter()
            try:
                self._fetch(capture, piece)
            except RuntimeError as error:  # a device that no longer answers: this save can not be made
                capture.fail(error)
            capture.figures.copying += time.perf_counter() - began
            if piece.source._version != piece.version:
                capture.fail(TornError(f"{capture}: '{piece.part.name}' changed while it was being copied; this save was given up."))
            capture.arrived(piece)

    def _fetch(self, capture: _Capture, piece: _Piece) -> None:
        assert piece.host is not None
        if not piece.source.is_cuda:
            _copy_on_host(piece.host, piece.source)
            return
        stream = self._streams.setdefault(piece.source.device, torch.cuda.Stream(piece.source.device))
        with torch.cuda.stream(stream):
            stream.wait_event(capture.moment(piece.source.device))
            piece.host.copy_(piece.source, non_blocking=True)
            piece.event = stream.record_event()

    def _write(self, capture: _Capture) -> None:
        began = time.perf_counter()
        try:
            if capture.path is None:
                self._peers.together(lambda: self._put(capture, None))
            else:
                self.newest = self._publish(capture, capture.path)
                if capture.published is not None:
                    capture.published(self.newest)
        except TornError as error:
            capture.figures.torn = True
            warnings.warn(str(error), stacklevel=1)
        except BaseException as error:  # carried to the caller's thread, which raises it
            self._error = error
            capture.fail(error)
        for piece in capture.copied_pieces():
            self._let_go(piece)
        capture.figures.writing = time.perf_counter() - began
        self.figures.append(capture.figures)
        capture.done.set()

    def _publish(self, capture: _Capture, path: Path) -> Checkpoint:
        with Writer(path, self._peers) as writer:
            for name, data in capture.state.files.items():
                writer.put_file(name, data)
            for stem, specs in capture.specs.items():
                writer.declare(stem, specs)
            self._peers.together(lambda: self._put(capture, writer))
            return writer.publish(capture.lineage(self.newest))

    def _put(self, capture: _Capture, writer: Writer | None) -> None:
        for piece in capture.copied_pieces():
            try:
                if piece.event is not None:
                    piece.event.synchronize()
                if writer is not None and capture.error is None and piece.host is not None:
                    writer.put_part(piece.stem, piece.part, piece.host)
            finally:
                self._let_go(piece)
        capture.compared.wait()
        if capture.error is not None:
            raise capture.error

    def _let_go(self, piece: _Piece) -> None:
        if piece.region is not None and self._ring is not None:
            self._ring.give_back(piece.region)
        piece.region = piece.host = None


class _Capture:
    """One save on its way: which pieces are still to be copied, and which wait for the writer."""

    def __init__(
        self,
        path: Path | None,
        state: State,
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
        self.waiting: deque[_Piece] = deque()
        self._moments: dict[torch.device, torch.cuda.Event] = {}
        self._last: dict[torch.device, torch.cuda.Event] = {}
        self._changed = threading.Condition()
        self._early: deque[_Piece] = deque()
        self._ready: queue.Queue[_Piece | None] = queue.Queue()
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
            piece = _Piece(stem, part, source, source._version, 0)
            piece.host = _cloned(source) if kept is None else kept.copy_(source)
            self._early.append(piece)
            return
        storage = _storage(source)
        places = [host for _, host in _pieces(part, kept)] if kept is not None else []
        for number, (inner, view) in enumerate(_pieces(part, source)):
            self.waiting.append(_Piece(stem, inner, view, source._version, storage, host=places[number] if places else None))
            self._left[storage] = self._left.get(storage, 0) + 1
        if source.is_cuda and source.device not in self._moments:
            self._moments[source.device] = torch.cuda.current_stream(source.device).record_event()
        if guard == "blocks":
            first = blake3(f"{self}/{part.name}".encode()).digest()[0] * source.numel() // 256
            self._checked.append((part, source, first, _block(source, first)))

    def moment(self, device: torch.device) -> torch.cuda.Event:
        """When the update was done on this device; copies begin after it."""
        return self._moments[device]

    def pieces(self) -> Iterator[_Piece]:
        """The pieces that are still to be copied, those first that somebody waits for; none once the save has failed."""
        while True:
            with self._changed:
                if self.error is not None:
                    self._give_up()
                if not self.waiting:
                    return
                piece = self.waiting.popleft()
            yield piece

    def arrived(self, piece: _Piece) -> None:
        """A piece is copied (on a GPU: its copy is queued), and goes to the writer."""
        with self._changed:
            if piece.event is not None:
                self._last[piece.source.device] = piece.event
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

    def copied_pieces(self) -> Iterator[_Piece]:
        """Pieces in the order of their arrival, to the last one; each is given once."""
        while self._early:
            yield self._early.popleft()
        while (piece := self._ready.get()) is not None:
            yield piece
        self._ready.put(None)

    def keep_or_not(self) -> None:
        """All is copied, or the save has failed: so has what keeps it in memory."""
        if self._keeping is not None:
            for event in self._last.values():
                event.synchronize()
            self._keeping.commit() if self.error is None else self._keeping.abort()
            self._keeping = None

    def compare_blocks(self, storages: set[int] | None) -> None:
        """Under the guard 'blocks': notice tensors that changed before they might, in ways that torch does not count."""
        left = []
        for part, source, first, before in self._checked:
            if storages is not None and _storage(source) not in storages:
                left.append((part, source, first, before))
            elif _block(source, first) != before:
                self.fail(TornError(f"{self}: '{part.name}' changed before the update began; this save was given up."))
        self._checked = left
        if not left:
            self.compared.set()

    def _order_streams(self) -> float:
        """On a GPU the copies are only queued: what the computing streams do next must come after them."""
        for device, event in self._last.items():
            torch.cuda.current_stream(device).wait_event(event)
        return 0.0

    def _count(self, piece: _Piece) -> None:
        self._left[piece.storage] -= 1
        if not self._left[piece.storage]:
            del self._left[piece.storage]

    def _give_up(self) -> None:
        while self.waiting:
            self._count(self.waiting.popleft())
        if not self._left:
            self._ready.put(None)
        self._changed.notify_all()


class _Pace:
    """Which mode the next save takes. `auto` times each in turn, from a save to the update after it, and keeps the faster."""

    def __init__(self, mode: Mode) -> None:
        self._fixed: str | None = None if mode == "auto" else mode
        self._seconds: dict[str, list[float]] = {"lazy": [], "eager": []}

    def choose(self) -> str:
        if self._fixed is None and all(len(taken) > TRIALS for taken in self._seconds.values()):
            # The first of each is left out: it also pays for memory that is touched for the first time.
            self._fixed = min(self._seconds, key=lambda mode: statistics.median(self._seconds[mode][1:]))
        return self._fixed or min(self._seconds, key=lambda mode: len(self._seconds[mode]))

    def took(self, mode: str, seconds: float) -> None:
        self._seconds[mode].append(seconds)


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


def _copy_on_host(target: torch.Tensor, source: torch.Tensor) -> None:
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


def _storage(local: torch.Tensor) -> int:
    return local.untyped_storage().data_ptr()


def _block(source: torch.Tensor, first: int) -> bytes:
    flat = source.reshape(-1)[first : first + 1024] if source.is_contiguous() else source.flatten()[first : first + 1024]
    return blake3(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes()).digest()
