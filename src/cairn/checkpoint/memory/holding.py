"""What a keeper holds and does with it: areas to write into, made whole, read, checked, and given to the disk. Torch is not needed here."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cairn.checkpoint.format.manifest import BLOCK_BYTES
from cairn.checkpoint.memory.area import CLEAN, EMPTY, STATES, WRITING, Area, Header, Version
from cairn.checkpoint.memory.link import KEEPERS, GoneError, Home, Link, Settings, home_at
from cairn.checkpoint.memory.parity import Code
from cairn.errors import InputError

RETRY = 0.05
"""Seconds between two looks at a keeper that is not ready yet, or not there."""


class Keeper:
    """What one keeper holds and does. Every conversation has a thread; `_changed` guards the areas."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.folder, self.run = settings, Path(settings.folder), Path(settings.run)
        self.data = [Area(self.folder / f"data-{number}") for number in range(settings.slots)]
        self.parity = [Area(self.folder / f"parity-{number}") for number in range(settings.slots)]
        self._changed = threading.Condition()
        self._leases: Counter[int] = Counter()
        self._committed: set[int] = set()
        self._trainer: object | None = None
        self._needed, self._members = time.monotonic(), list[str]()
        self._persisting, self._encoding = threading.Lock(), threading.Lock()
        self.counts: Counter[str] = Counter()
        self.closed = False
        for area in (*self.data, *self.parity):
            if area.state == WRITING or (area.state == CLEAN and area.clean is None):
                area.clear()  # the process that wrote or computed it is gone

    # -- what a trainer asks ---------------------------------------------------------------------------------------

    def attach(self, who: object, members: list[str]) -> dict[str, Any]:
        """Take a conversation for that of the trainer: it dies when that ends. `members` names all keepers of the job by rank."""
        with self._changed:
            self._trainer, self._members = who, members
        for number, area in enumerate(self.data):
            header = area.clean
            if header is not None and header.parity and self.parity[number].clean is None:
                threading.Thread(target=self._protect, args=(number, header), daemon=True).start()
        return {}

    def begin(self, header: Header, keep: Version | None) -> dict[str, Any]:
        """An area to write the next snapshot into: any but the one that holds version `keep`, and none that is being read."""
        with self._changed:
            free = [n for n, area in enumerate(self.data) if not self._leases[n] and n not in self._committed and not self.holds(n, keep)]
            if not free:
                self.counts["refused"] += 1
                raise InputError("Every slot of the keeper is in use.")
            number = min(free, key=lambda n: (self.data[n].state != EMPTY, self._version(n)))
            self.parity[number].clear()
            self.data[number].begin(header)
            return {"path": str(self.data[number].path), "slot": number}

    def _version(self, number: int) -> tuple[str, int]:
        header = self.data[number].header
        return (header.attempt, header.step) if header is not None else ("", -1)

    def holds(self, number: int, version: Version | None) -> bool:
        """Whether a slot is that of a version."""
        header = self.data[number].header
        return header is not None and header.version == version

    def commit(self, number: int) -> dict[str, Any]:
        """The trainer has written all of it: from here on its death changes nothing."""
        with self._changed:
            self._committed.add(number)
        threading.Thread(target=self._finish, args=(number,), daemon=True).start()
        return {}

    def abort(self, number: int) -> dict[str, Any]:
        """The trainer gives up: nothing of it stays, unless all of it was written before."""
        with self._changed:
            if number not in self._committed and self.data[number].state == WRITING:
                self.data[number].clear()
        return {}

    def protected(self, version: Version, wait: float) -> dict[str, Any]:
        """`yes` once a version is whole here, parity included; `no` if it is not after `wait` seconds; `none` if it is not here."""
        end = time.monotonic() + wait
        with self._changed:
            while True:
                state = self._protection(version)
                if state != "no" or time.monotonic() >= end:
                    return {"protected": state}
                self._changed.wait(end - time.monotonic())

    def _protection(self, version: Version) -> str:
        for number, area in enumerate(self.data):
            if self.holds(number, version):
                header = area.header
                whole = header is not None and area.state == CLEAN and (not header.parity or self._encoded(number, version))
                return "yes" if whole else "no"
        return "none"

    def _encoded(self, number: int, version: Version) -> bool:
        header = self.parity[number].header
        return self.parity[number].state == CLEAN and header is not None and header.version == version

    def left(self, who: object) -> None:
        """A conversation has ended; if it was the trainer's, what he had begun and not committed never was."""
        with self._changed:
            if who is not self._trainer:
                return
            self._trainer, self._needed = None, time.monotonic()
            for number, area in enumerate(self.data):
                if area.state == WRITING and number not in self._committed:
                    area.clear()
                    self.counts["torn"] += 1

    # -- making a snapshot whole -----------------------------------------------------------------------------------

    def _finish(self, number: int) -> None:
        with self._taken_down():
            header = self.data[number].seal()
            with self._changed:
                self._committed.discard(number)
                self.counts["snapshots"] += 1
                self._changed.notify_all()
            if header.parity:
                self._protect(number, header)

    def _protect(self, number: int, header: Header) -> None:
        """Compute this member's share of the parity, as soon as the other members of its group have the version."""
        with self._taken_down():
            while not self.closed and self.holds(number, header.version) and not self._encoded(number, header.version):
                try:
                    with self._encoding:
                        if self.closed:
                            return
                        sealed = _share(self, number, header)
                        with self._changed:
                            if self.holds(number, header.version):
                                self.parity[number].seal(**sealed)
                                self.counts["encoded"] += 1
                            self._changed.notify_all()
                except (GoneError, _NotYet):
                    time.sleep(RETRY)

    @contextlib.contextmanager
    def _taken_down(self) -> Iterator[None]:
        """Once the keeper is closed, its areas may go while a thread still works in them: there is nothing left that it works for."""
        try:
            yield
        except (OSError, InputError, AssertionError):
            if not self.closed:
                raise

    def close(self, wait: float = 10.0) -> None:
        """Its areas are about to go: let what is being sealed or encoded come to its end first, and begin nothing any more."""
        end = time.monotonic() + wait
        with self._changed:
            self.closed = True
            while self._committed and time.monotonic() < end:
                self._changed.wait(end - time.monotonic())
        if self._encoding.acquire(timeout=max(0.0, end - time.monotonic())):
            self._encoding.release()  # a file that was made now would stay behind

    def member(self, rank: int) -> Home:
        """Where the keeper of another member lives now. Raises `GoneError` while it has none."""
        home = home_at(self.run / KEEPERS / f"{self._members[rank]}.json") if rank < len(self._members) else None
        if home is None:
            raise GoneError(f"Process {rank} has no keeper.")
        return home

    # -- what anyone asks ------------------------------------------------------------------------------------------

    def area(self, kind: str, version: Version) -> tuple[int, Area, Header]:
        """The clean area of a kind ('data' or 'parity') that holds a version. Raises `InputError` if there is none."""
        for number, area in enumerate(self.data if kind == "data" else self.parity):
            header = area.header
            if area.state == CLEAN and header is not None and header.version == version:
                return number, area, header
        raise InputError(f"The keeper {self.settings.name} has no {kind} of step {version.step}.")

    def status(self) -> dict[str, Any]:
        """What it holds, and for whom."""
        with self._changed:
            areas = []
            for kind, several in (("data", self.data), ("parity", self.parity)):
                for area in several:
                    header = area.clean if area.state == CLEAN else area.header
                    plain = header.model_dump(mode="json") if header is not None else None
                    areas.append({"kind": kind, "path": str(area.path), "state": STATES[area.state], "bytes": area.capacity, "header": plain})
            return {
                "name": self.settings.name,
                "node": self.settings.node,
                "pid": os.getpid(),
                "trainer": self._trainer is not None,
                "idle": 0.0 if self._trainer is not None else time.monotonic() - self._needed,
                "counts": dict(self.counts),
                "areas": areas,
            }

    def check(self, version: Version) -> dict[str, Any]:
        """The damaged blocks of a version's data and parity; None for what is not here."""
        found: dict[str, Any] = {"data": None, "parity": None}
        for kind in found:
            with contextlib.suppress(InputError):
                found[kind] = self.area(kind, version)[1].damaged()
        return found

    def lease(self, version: Version, by: int) -> dict[str, Any]:
        """Count readers of a version in or out; while there are any, its memory is not written."""
        number, _, _ = self.area("data", version)
        with self._changed:
            self._leases[number] += by
        return {"slot": number}

    def persist(self, path: str | None) -> dict[str, Any]:
        """Write the newest whole state of the job, of all its keepers, to disk; says where it is."""
        from cairn.checkpoint.memory.persist import persist

        with self._persisting:
            saved = persist(self.run, Path(path) if path else None)
        return {"path": str(saved.path), "step": saved.step, "digest": saved.digest}

    def touched(self) -> None:
        """Somebody needs this keeper."""
        self._needed = time.monotonic()

    @property
    def forgotten(self) -> bool:
        """Whether nobody has needed it for as long as it was told to wait."""
        return self._trainer is None and time.monotonic() - self._needed > self.settings.idle

    @property
    def empty(self) -> bool:
        return all(area.state != CLEAN for area in self.data)


class _NotYet(Exception):
    """Another member has not come as far."""


def _share(keeper: Keeper, number: int, header: Header) -> dict[str, Any]:
    """Fill a member's parity area from the other members' data; returns what its header is to say of them."""
    code, mine = Code(len(header.group), header.parity), header.group.index(header.member)
    others = [rank for rank in header.group if rank != header.member]
    with contextlib.ExitStack() as stack:
        known, peers = {header.member: header}, {}
        version = {"step": header.step, "attempt": header.attempt}
        for rank in others:
            peers[rank] = stack.enter_context(Link(keeper.member(rank)))
            try:
                known[rank] = Header.model_validate(peers[rank].ask("header", kind="data", **version)["header"])
            except InputError:
                raise _NotYet from None
        sizes = {rank: known[rank].body for rank in header.group}
        size = code.block_bytes(max(sizes.values()))
        area = keeper.parity[number]
        area.begin(header.model_copy(update={"size": code.parity * size, "root": ""}))
        target = area.payload()
        for held in range(code.parity):
            stripe = (mine - held) % code.members
            sources = {block: position for position in range(code.members) if (block := code.block(stripe, position)) is not None}
            for begin in range(0, size, BLOCK_BYTES):
                if keeper.closed or not keeper.holds(number, header.version):
                    raise _NotYet
                end = min(begin + BLOCK_BYTES, size)
                pieces = []
                for block in range(code.blocks):
                    rank = header.group[sources[block]]
                    piece = np.zeros(end - begin, np.uint8)
                    first, last = block * size + begin, min(block * size + end, sizes[rank])
                    if first < last:
                        data = peers[rank].ask_bytes("read", kind="data", begin=first, end=last, **version)[1] if rank in peers else None
                        piece[: last - first] = np.frombuffer(keeper.data[number].read(first, last) if data is None else data, np.uint8)
                    pieces.append(piece)
                target[held * size + begin : held * size + end] = code.encode(pieces, held).data
    return {"sizes": {rank: known[rank].size for rank in header.group}, "roots": {rank: known[rank].root for rank in header.group}}
