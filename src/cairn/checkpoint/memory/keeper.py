"""The keeper: a process that owns the snapshots of one trainer, and outlives it.

It hands out areas of shared memory to write into, makes them whole (digests, parity with the keepers of other nodes),
answers whoever wants to read, and holds everything until it is told to stop or nobody has needed it for long; before it
leaves on its own account it writes what it holds to disk. Torch is not needed here.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from cairn.checkpoint.manifest import BLOCK_BYTES
from cairn.checkpoint.memory.area import CLEAN, EMPTY, STATES, WRITING, Area, Header, Version
from cairn.checkpoint.memory.link import KEEPERS, SOCKET, GoneError, Home, Link, Settings, answers, home_at, short_path
from cairn.checkpoint.memory.parity import Code
from cairn.errors import CairnError, InputError

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
        for area in (*self.data, *self.parity):
            if area.state == WRITING or (area.state == CLEAN and area.clean is None):
                area.clear()  # whoever wrote it, or computed it, is gone

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
        """The trainer gives up: nothing of it stays."""
        with self._changed:
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
        header = self.data[number].seal()
        with self._changed:
            self._committed.discard(number)
            self.counts["snapshots"] += 1
            self._changed.notify_all()
        if header.parity:
            self._protect(number, header)

    def _protect(self, number: int, header: Header) -> None:
        """Compute this member's share of the parity, as soon as the other members of its group have the version."""
        while self.holds(number, header.version) and not self._encoded(number, header.version):
            try:
                with self._encoding:
                    sealed = _share(self, number, header)
                    with self._changed:
                        if self.holds(number, header.version):
                            self.parity[number].seal(**sealed)
                            self.counts["encoded"] += 1
                        self._changed.notify_all()
            except (GoneError, _NotYet):
                time.sleep(RETRY)

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
                if not keeper.holds(number, header.version):
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
    return {"sizes": sizes, "roots": {rank: known[rank].root for rank in header.group}}


class Server:
    """The sockets of a keeper, and its life."""

    def __init__(self, settings: Settings) -> None:
        folder = Path(settings.folder)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.keeper, self.secret, self._leaving = Keeper(settings), secrets.token_hex(16), threading.Event()
        self._file = Path(settings.run) / KEEPERS / f"{settings.name}.json"
        (folder / SOCKET).unlink(missing_ok=True)
        local = socket.socket(socket.AF_UNIX)
        with short_path(folder) as name:
            local.bind(f"{name}/{SOCKET}")
        self._sockets, port = [local], 0
        if settings.address is not None:
            remote = socket.create_server(("0.0.0.0", 0), backlog=64)
            self._sockets, port = [local, remote], remote.getsockname()[1]
        self.home = Home(name=settings.name, node=settings.node, folder=settings.folder, pid=os.getpid(), host=settings.address, port=port, secret=self.secret)
        for listening in self._sockets:
            listening.listen(64)
            threading.Thread(target=self._accept, args=(listening, listening is local), daemon=True).start()
        beside = self._file.with_suffix(f".{os.getpid()}")
        beside.touch(mode=0o600)
        beside.write_text(self.home.model_dump_json())
        beside.replace(self._file)

    def _accept(self, listening: socket.socket, local: bool) -> None:
        while not self._leaving.is_set():
            try:
                conversation, _ = listening.accept()
            except OSError:
                return  # closed: we leave
            threading.Thread(target=self._converse, args=(conversation, local), daemon=True).start()

    def _converse(self, conversation: socket.socket, known: bool) -> None:
        who, held = object(), Counter[Version]()
        try:
            with conversation, conversation.makefile("rb") as reader:
                for line in reader:
                    request = json.loads(line)
                    if request["act"] != "status":
                        self.keeper.touched()
                    if not known:
                        known = request["act"] == "hello" and secrets.compare_digest(str(request.get("secret")), self.secret)
                        if not known:
                            return
                    answer, data = self._answer(request, who, held)
                    conversation.sendall(json.dumps(answer | ({"bytes": len(data)} if data is not None else {})).encode() + b"\n")
                    if data is not None:
                        conversation.sendall(data)
        except (OSError, ValueError, KeyError, TypeError):
            pass  # whoever spoke is gone, or does not speak our language
        finally:
            for version, count in held.items():
                with contextlib.suppress(InputError):
                    self.keeper.lease(version, -count)
            self.keeper.left(who)

    def _answer(self, request: dict[str, Any], who: object, held: Counter[Version]) -> tuple[dict[str, Any], memoryview | None]:
        act, keeper = request["act"], self.keeper
        version = Version(request["step"], request["attempt"]) if "step" in request else None
        try:
            if act == "attach":
                return keeper.attach(who, request["members"]), None
            if act == "begin":
                return keeper.begin(Header.model_validate(request["header"]), Version(*request["keep"]) if request["keep"] else None), None
            if act in ("commit", "abort"):
                return getattr(keeper, act)(request["slot"]), None
            if act == "persist":
                return keeper.persist(request.get("path")), None
            if act == "stop":
                return self._stop(bool(request.get("persist"))), None
            if version is not None:
                return self._about(act, request, version, held)
            return keeper.status() if act == "status" else {}, None
        except CairnError as error:
            return {"refused": str(error)}, None

    def _about(self, act: str, request: dict[str, Any], version: Version, held: Counter[Version]) -> tuple[dict[str, Any], memoryview | None]:
        keeper = self.keeper
        if act == "protected":
            return keeper.protected(version, request["wait"]), None
        if act == "check":
            return keeper.check(version), None
        if act == "lease":
            held[version] += 1
            return keeper.lease(version, 1), None
        _, area, header = keeper.area(request["kind"], version)
        if act == "header":
            return {"header": header.model_dump(mode="json")}, None
        return {}, area.read(max(0, request["begin"]), min(request["end"], header.body))

    def _stop(self, persist: bool) -> dict[str, Any]:
        saved = self.keeper.persist(None) if persist else {}
        self._leaving.set()
        return saved

    def serve(self) -> None:
        """Until told to stop, forgotten, or replaced by another keeper of the same name."""
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        asked = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: asked.set())
        while not self._leaving.wait(0.2):
            current = home_at(self._file)
            if current is None or current.pid != os.getpid():
                break  # the run directory is gone, or somebody else keeps it
            if asked.is_set() or self.keeper.forgotten:
                self._save_first()
                break
        self._leave()

    def _save_first(self) -> None:
        """Have what the keepers hold written to disk, once: by the first of them that answers."""
        if self.keeper.empty:
            return
        others = [home for home in (home_at(path) for path in sorted(self._file.parent.glob("*.json"))) if home is not None]
        for home in others:
            if home.pid == os.getpid() or answers(home):
                try:
                    with Link(home, timeout=3600) as link:
                        print(f"written to {link.ask('persist')['path']}", file=sys.stderr, flush=True)
                    return
                except GoneError:
                    continue
                except InputError as error:
                    print(error, file=sys.stderr, flush=True)
                    return

    def close(self) -> None:
        """Answer nobody any more."""
        self._leaving.set()
        for listening in self._sockets:
            listening.shutdown(socket.SHUT_RDWR)  # a close alone would let one more in
            listening.close()

    def _leave(self) -> None:
        self.close()
        current = home_at(self._file)
        if current is None or current.pid == os.getpid():
            shutil.rmtree(self.keeper.folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.keeper.folder.parent.rmdir()  # unless others keep something there
            self._file.unlink(missing_ok=True)


def main() -> None:
    """Become a process of its own, and tell whoever started it when it is ready."""
    settings = Settings.model_validate_json(sys.argv[1])
    read, write = os.pipe()
    if os.fork():
        os.close(write)
        ready = os.read(read, 4096)
        sys.stderr.write("" if ready == b"ready" else ready.decode())
        os._exit(0 if ready == b"ready" else 1)
    os.setsid()
    os.environ["CAIRN_NODE"] = settings.node
    log = os.open(Path(settings.run) / KEEPERS / f"{settings.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDWR)
    for number, to in ((0, null), (1, log), (2, log)):
        os.dup2(to, number)
    os.nice(5)
    try:
        server = Server(settings)
    except (CairnError, OSError) as error:
        os.write(write, str(error).encode())
        os._exit(1)
    os.write(write, b"ready")
    os.close(write)
    server.serve()
    os._exit(0)


if __name__ == "__main__":
    main()
