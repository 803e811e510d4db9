"""Saving without stalling: state is copied in the background while the next gradient is computed.

Weights and moments do not change from the end of one update to the start of the next. In that window a thread copies
them, piece by piece, into a ring of host memory, and another thread writes what has arrived. Training waits in two
places only: just before the next update, for copies that are not made yet (never for the disk, unless the ring is full),
and at the end of the run. ("DataStates-LLM: Lazy Asynchronous Checkpointing", section 4)

    saver = Background()
    saver.save(path, NamedState(groups, files), lineage)    # returns at once
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
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import torch

from cairn.checkpoint.format import layout
from cairn.checkpoint.format.layout import TensorSpec
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.parts import Part, local_of, owners, part_of
from cairn.checkpoint.format.place import place
from cairn.checkpoint.saving.captured import Capture, Figures, Guard, Keeping, NamedState, Parts, PendingCopy, Specs, TornError, copy_on_host, storage_of
from cairn.checkpoint.saving.peers import Peers
from cairn.checkpoint.saving.ring import Ring
from cairn.checkpoint.saving.write import Writer, spec_of
from cairn.errors import InputError

if TYPE_CHECKING:
    from cairn.checkpoint.format.read import Checkpoint

TRIALS = 3
"""Saves of each mode that `auto` times before it decides."""

Mode = Literal["lazy", "eager", "auto", "off"]
"""`off`: a save is written at once from the live tensors, in the caller's thread and without a copy."""


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
        self._current: Capture | None = None
        self._pending: deque[Capture] = deque()
        self._error: BaseException | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.figures: deque[Figures] = deque(maxlen=1000)
        """Of the newest saves."""
        self.newest: Checkpoint | None = None
        """The last checkpoint that was published here; the parent of the next one if it is set before."""
        # One act queues a save for both threads: the one that copies hands it on. An interrupt finds it queued or not at all.
        self._copies: queue.SimpleQueue[Capture | None] = queue.SimpleQueue()
        self._writes: queue.SimpleQueue[Capture | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._copy_all, name="cairn-copy", daemon=True),
            threading.Thread(target=self._write_all, name="cairn-save", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # -- the caller's thread --------------------------------------------------------------------------------------

    def save(
        self,
        path: str | Path | None,
        state: NamedState,
        lineage: Callable[[Checkpoint | None], Lineage],
        published: Callable[[Checkpoint], object] | None = None,
        keep: Callable[[Specs, Parts], Keeping | None] | None = None,
    ) -> threading.Event:
        """Ask for a checkpoint of the state as it stands; returns as soon as what cannot wait is copied.

        `lineage` is asked with the checkpoint published before, `published` told when this one is; both on another thread.
        `keep` may give memory that keeps what is captured, with a `path` beside the disk and with None instead of it. The
        callback that is returned is set when nothing of this save is under way any more. Raises what went wrong in an earlier one.
        """
        self.check()
        self.before_update()  # one set of tensors is captured at a time
        if self._pace.off:
            if keep is not None:
                raise InputError("Snapshots in memory are captured: checkpoint.capture=off and fault_tolerance.memory exclude each other.")
            return self._write_now(path, state, lineage, published)
        specs, parts = self._layout(state)
        keeping = keep(specs, parts) if keep is not None else None
        mode = self._pace.choose()
        capture = Capture(place(path) if path is not None else None, state, specs, parts, mode, self._guard, lineage, published, keeping)
        if path is None and keeping is None:
            capture.done.set()
            return capture.done
        self._ring = self._fitting(capture)
        while self._pending and self._pending[0].done.is_set():
            self._pending.popleft()
        self._copies.put(capture)
        # From here on it is waited for; what was not queued never is.
        self._current = capture
        self._pending.append(capture)
        if mode == "eager":
            capture.wait(None)
        return capture.done

    def _write_now(
        self, path: str | Path | None, state: NamedState, lineage: Callable[[Checkpoint | None], Lineage], published: Callable[[Checkpoint], object] | None
    ) -> threading.Event:
        """Write a checkpoint from the live tensors before this returns: no memory but that of the tensors themselves."""
        done = threading.Event()
        done.set()
        if path is None:
            return done
        groups = {stem: tensors for stem, tensors in state.groups.items() if tensors}
        with Writer(place(path), self._planning) as writer:
            for name, data in state.files.items():
                writer.put_file(name, data)
            for stem, tensors in groups.items():
                writer.declare(stem, [spec_of(name, tensor) for name, tensor in tensors.items()])
            writer.put_all(groups)
            self.newest = writer.publish(lineage(self.newest))
        if published is not None:
            published(self.newest)
        return done

    def before_update(self, tensors: Iterable[torch.Tensor] | None = None) -> float:
        """Wait until the captured tensors (of `tensors`, or all) are copied and may change; returns the seconds waited."""
        capture = self._current
        if capture is None:
            return 0.0
        storages = None if tensors is None else {storage_of(local_of(tensor)) for tensor in tensors}
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
            self._copies.put(None)
            if not self._pending:
                # A thread that still lets go of tensors when the interpreter ends would abort the process, its work done.
                for thread in self._threads:
                    thread.join()
                self._ring = None  # not before: a save may be done while the copying thread has not looked at it yet

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _layout(self, state: NamedState) -> tuple[Specs, Parts]:
        """The tensors, and what this process copies of them; found again only when names or shapes have changed, which all processes
        see alike."""
        key = [(stem, name, tensor.shape, tensor.dtype) for stem, tensors in state.groups.items() for name, tensor in tensors.items()]
        if self._known is None or self._known[0] != key:
            groups = {stem: tensors for stem, tensors in state.groups.items() if tensors}
            specs = {stem: [spec_of(name, tensor) for name, tensor in tensors.items()] for stem, tensors in groups.items()}
            held = {stem: [part_of(name, tensor) for name, tensor in tensors.items()] for stem, tensors in groups.items()}
            everyone = self._planning.gather(held)
            parts = {}
            for stem, listed in specs.items():
                mine = owners([process[stem] for process in everyone], {spec.name: spec.shape for spec in listed})[self._planning.rank]
                parts[stem] = _in_file_order(mine, listed)
            self._known = key, specs, parts
        return self._known[1:]

    def _fitting(self, capture: Capture) -> Ring:
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

    def _copy_all(self) -> None:
        while (capture := self._copies.get()) is not None:
            self._writes.put(capture)
            for piece in capture.pieces():
                try:
                    self._copy(capture, piece)
                except BaseException as error:  # a device that no longer answers, or whatever: this save cannot be made, and nobody may wait for it
                    capture.fail(error)
                capture.arrived(piece)
        self._writes.put(None)

    def _write_all(self) -> None:
        while (capture := self._writes.get()) is not None:
            self._write(capture)

    def _copy(self, capture: Capture, piece: PendingCopy) -> None:
        assert self._ring is not None
        ring = self._ring
        if piece.host is None:
            before = ring.waited
            piece.region = ring.take(piece.source.nbytes)
            capture.figures.room += ring.waited - before
            piece.host = ring.view(piece.region).view(piece.source.dtype).view(piece.source.shape)
        began = time.perf_counter()
        self._fetch(capture, piece)
        capture.figures.copying += time.perf_counter() - began
        if piece.source._version != piece.version:
            capture.fail(TornError(f"{capture}: '{piece.part.name}' changed while it was being copied; this save was given up."))

    def _fetch(self, capture: Capture, piece: PendingCopy) -> None:
        assert piece.host is not None
        if not piece.source.is_cuda:
            copy_on_host(piece.host, piece.source)
            return
        stream = self._streams.setdefault(piece.source.device, torch.cuda.Stream(piece.source.device))
        with torch.cuda.stream(stream):
            stream.wait_event(capture.moment(piece.source.device))
            piece.host.copy_(piece.source, non_blocking=True)
            piece.callback = stream.record_event()

    def _write(self, capture: Capture) -> None:
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

    def _publish(self, capture: Capture, path: Path) -> Checkpoint:
        with Writer(path, self._peers, busy=True) as writer:
            for name, data in capture.state.files.items():
                writer.put_file(name, data)
            for stem, specs in capture.specs.items():
                writer.declare(stem, specs)
            self._peers.together(lambda: self._put(capture, writer))
            return writer.publish(capture.lineage(self.newest))

    def _put(self, capture: Capture, writer: Writer | None) -> None:
        for piece in capture.copied_pieces():
            try:
                if piece.callback is not None:
                    piece.callback.synchronize()
                if writer is not None and capture.error is None and piece.host is not None:
                    writer.put_part(piece.stem, piece.part, piece.host)
            finally:
                self._let_go(piece)
        capture.compared.wait()
        if capture.error is not None:
            raise capture.error

    def _let_go(self, piece: PendingCopy) -> None:
        if piece.region is not None and self._ring is not None:
            self._ring.give_back(piece.region)
        piece.region = piece.host = None


def _in_file_order(parts: Iterable[Part], specs: Iterable[TensorSpec]) -> list[Part]:
    """So that blocks are digested from the bytes as they are written."""
    places = {spec.name: layout.order(spec) for spec in specs}
    return sorted(parts, key=lambda part: (places[part.name], part.offset))


class _Pace:
    """Which mode the next save takes. `auto` times each in turn, from a save to the update after it, and keeps the faster."""

    def __init__(self, mode: Mode) -> None:
        self.off = mode == "off"
        self._fixed: str | None = None if mode == "auto" else mode
        self._seconds: dict[str, list[float]] = {"lazy": [], "eager": []}

    def choose(self) -> str:
        if self._fixed is None and all(len(taken) > TRIALS for taken in self._seconds.values()):
            # The first of each is left out: it also pays for memory that is touched for the first time.
            self._fixed = min(self._seconds, key=lambda mode: statistics.median(self._seconds[mode][1:]))
        return self._fixed or min(self._seconds, key=lambda mode: len(self._seconds[mode]))

    def took(self, mode: str, seconds: float) -> None:
        self._seconds[mode].append(seconds)
