"""The keeper: a process that owns the snapshots of one trainer, and outlives it.

It hands out areas of shared memory to write into, makes them whole (digests, parity with the keepers of other nodes),
answers every reader, and holds everything until it is told to stop or nobody has needed it for long; before it
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
from collections import Counter
from pathlib import Path
from typing import Any

from cairn.checkpoint.format import documents
from cairn.checkpoint.memory.area import Header, Version
from cairn.checkpoint.memory.holding import Keeper
from cairn.checkpoint.memory.link import KEEPERS, SOCKET, GoneError, Home, Link, Settings, allow, answers, home_at, short_path
from cairn.errors import CairnError, DamagedError, InputError


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
        documents.keep(self._file, self.home.model_dump_json(), mode=0o600)

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
                    request = documents.as_object(documents.parse(line, "a request"), "a request")
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
        except (OSError, ValueError, KeyError, TypeError, DamagedError):
            pass  # the other end is gone, or does not speak our language
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
        self.keeper.close()
        current = home_at(self._file)
        if current is None or current.pid == os.getpid():
            shutil.rmtree(self.keeper.folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.keeper.folder.parent.rmdir()  # unless others keep something there
            self._file.unlink(missing_ok=True)


def main() -> None:
    """Become a process of its own, and tell the process that started it when it is ready."""
    settings = Settings.model_validate_json(sys.argv[1])
    allow(Path(settings.run))
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
