"""Finding a run's keepers and speaking to them: JSON lines over a socket, raw bytes after a line that announces them.

Every keeper writes where it can be reached into `RUN/keepers/NAME.json`, readable by its owner alone. On its own node it
is met at a socket in its memory folder, from other nodes by address and the secret in that file.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cairn.checkpoint.format import documents, trust
from cairn.errors import CairnError, DamagedError, InputError
from cairn.options import Options

KEEPERS = "keepers"
SOCKET = "socket"
IDENTITY = "identity"


class GoneError(CairnError):
    """A keeper does not answer: it, or its node, is gone."""


class Home(Options):
    """Where a keeper lives."""

    name: str
    """`<node>-<number of the process on it>`: stays the same over restarts, whatever rank the process gets."""
    node: str
    folder: str
    pid: int
    host: str | None = None
    port: int = 0
    secret: str = ""


class Settings(Options):
    """What a keeper is started with."""

    run: str
    name: str
    node: str
    folder: str
    slots: int = 2
    idle: float = 600.0
    """Seconds without a trainer after which it writes what it holds to disk and leaves."""
    address: str | None = None
    """Where other nodes reach it; None where there is no other."""


def node() -> str:
    """The name of this node: $CAIRN_NODE, else the host's. What dies together must have one name."""
    return (os.environ.get("CAIRN_NODE") or socket.gethostname()).replace("/", "_")


def identity(run: Path) -> str:
    """A name for this run that no other run, earlier or elsewhere, has; made when first asked for.

    The user who makes it trusts the keepers that the run then names. Raises `InputError` where it was made by somebody else.
    """
    file = run / KEEPERS / IDENTITY
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with file.open("x") as made:
            made.write(uuid.uuid4().hex)
        trust.note("keepers", _trusted(run))
    except FileExistsError:
        refuse_strangers(run)  # made before, by an earlier attempt
    return file.read_text()


def allow(run: Path) -> None:
    """In this process: the keepers that a run names are its own. Another process, which begins the run or goes on with it, knows so."""
    trust.allow("keepers", _trusted(run))


def refuse_strangers(run: Path) -> None:
    """Raise `InputError` unless the user began this run here: nothing connects to a keeper because a file names it."""
    if not trust.known("keepers", _trusted(run)):
        raise InputError(f"{run / KEEPERS} names keepers, and the run was not begun by you on this machine; --follow speaks to them.")


def _trusted(run: Path) -> str:
    """What is noted of a run: where it lies, and which one it is."""
    file = run / KEEPERS / IDENTITY
    try:
        return f"{run.resolve()} {documents.read_text(file, limit=256).strip()}"
    except FileNotFoundError:
        return f"{run.resolve()} unknown"


def memory_folder(run_identity: str, name: str, needed: int = 0) -> tuple[Path, str | None]:
    """Where a keeper's memory goes, and what to say if that is not shared memory.

    $CAIRN_MEMORY, else /dev/shm, else (it is absent, or has no `needed` bytes free, as in many containers) the temporary directory.
    """
    named = os.environ.get("CAIRN_MEMORY")
    inside = Path(f"cairn-{os.getuid()}") / f"{run_identity[:16]}-{name}"
    if named:
        return Path(named) / inside, None
    shared = Path("/dev/shm")
    if (shared / inside).is_dir():
        return shared / inside, None
    free = os.statvfs(shared) if shared.is_dir() else None
    if free is not None and free.f_bavail * free.f_frsize >= needed:
        return shared / inside, None
    elsewhere = Path(tempfile.gettempdir())
    return elsewhere / inside, f"/dev/shm has no room for {needed / 2**20:.0f} MiB of snapshots: they go to {elsewhere}, which may be a disk."


def homes(run: Path) -> dict[str, Home]:
    """The keepers that a run has or had, by name. Raises `InputError` where the run is a stranger's."""
    found, files = {}, sorted((run / KEEPERS).glob("*.json"))
    if files:
        refuse_strangers(run)
    for path in files:
        home = home_at(path)
        if home is not None:
            found[home.name] = home
    return found


def home_at(path: Path) -> Home | None:
    """The keeper described by a file, if there is one."""
    try:
        return documents.validated(Home, documents.read_json(path), path)
    except (OSError, DamagedError):
        return None


class Link:
    """A conversation with one keeper. Raises `GoneError` whenever it does not answer."""

    def __init__(self, home: Home, timeout: float = 20) -> None:
        self.home = home
        try:
            self._socket = _connected(home, timeout)
        except OSError as error:
            raise GoneError(f"The keeper {home.name} does not answer ({error.strerror or error}).") from None
        self._reader = self._socket.makefile("rb")
        if home.node != node():
            self.ask("hello", secret=home.secret)

    def ask(self, act: str, **fields: Any) -> dict[str, Any]:
        """Its answer. Raises `InputError` where it refuses."""
        return self.ask_bytes(act, **fields)[0]

    def ask_bytes(self, act: str, **fields: Any) -> tuple[dict[str, Any], bytes]:
        """Its answer and the bytes that follow."""
        try:
            self._socket.sendall(json.dumps({"act": act, **fields}).encode() + b"\n")
            line = self._reader.readline()
            answer = documents.as_object(documents.parse(line, "an answer"), "an answer") if line.endswith(b"\n") else None
            count = answer.get("bytes", 0) if answer else 0
            data = self._reader.read(count) if count else b""
        except (OSError, ValueError, DamagedError):
            answer, count, data = None, 0, b""
        if answer is None or len(data) != count:
            raise GoneError(f"The keeper {self.home.name} does not answer any more.")
        if "refused" in answer:
            raise InputError(answer["refused"])
        return answer, data

    def close(self) -> None:
        self._reader.close()
        self._socket.close()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _connected(home: Home, timeout: float) -> socket.socket:
    if home.node == node():
        found = socket.socket(socket.AF_UNIX)
        found.settimeout(timeout)
        with short_path(Path(home.folder)) as folder:
            found.connect(f"{folder}/{SOCKET}")
        return found
    if home.host is None:
        raise OSError(f"it serves its own node '{home.node}' alone")
    found = socket.create_connection((home.host, home.port), timeout)
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found


@contextlib.contextmanager
def short_path(folder: Path) -> Iterator[str]:
    """A folder by a name short enough for the address of a socket, which holds a hundred letters."""
    if len(str(folder)) < 90:
        yield str(folder)
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def links(run: Path, timeout: float = 5) -> Iterator[Link]:
    """A conversation with each keeper of a run that answers; each is closed when the next is asked for."""
    for home in homes(run).values():
        try:
            link = Link(home, timeout)
        except GoneError:
            continue
        with link:
            yield link


def start(settings: Settings) -> Home:
    """Start a keeper, or find it at work, and return where it lives. It outlives the process that starts it.

    Raises `InputError` if it does not come up.
    """
    allow(Path(settings.run))
    file = Path(settings.run) / KEEPERS / f"{settings.name}.json"
    known = home_at(file)
    if known is not None and known.folder == settings.folder and answers(known):
        return known
    command = [sys.executable, "-m", "cairn.checkpoint.memory.keeper", settings.model_dump_json()]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    home = home_at(file)
    if done.returncode or home is None:
        reason = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise InputError(f"The keeper of snapshots did not start: {reason}")
    return home


def answers(home: Home) -> bool:
    """Whether a keeper is there."""
    try:
        with Link(home, timeout=5):
            return True
    except GoneError:
        return False


def stop(run: Path, home: Home) -> bool:
    """Let one keeper go, with what it holds; whether it was there. One that is not is struck off the list."""
    try:
        with Link(home, timeout=5) as link:
            link.ask("stop")
            return True
    except GoneError:
        (run / KEEPERS / f"{home.name}.json").unlink(missing_ok=True)
        return False
