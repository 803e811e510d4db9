"""The user's cache: what was fetched or prepared once. Safe to delete at any time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from blake3 import blake3

_RACY = 2.0
"""Seconds within which a file can change without another time on it: what was touched so lately is read again."""
_HIDDEN = re.compile(r"\.(?P<name>.+)-[0-9a-f]{8}")


def directory() -> Path:
    """`$CAIRN_CACHE`, else `$XDG_CACHE_HOME/cairn`, else `~/.cache/cairn`."""
    named = os.environ.get("CAIRN_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cairn"


def publish(path: Path, fill: Callable[[Path], object]) -> None:
    """Make the directory `path` by filling a hidden one beside it and renaming: it is there whole or not at all.

    When two processes do the same at once, the first to finish wins and the other's work is dropped. What a killed process has left of the same
    directory is removed first; in the cache, what is left of any.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    with _hidden(path) as hidden:
        fill(hidden)
        try:
            hidden.rename(path)
        except OSError:
            if not path.exists():
                raise


def contents(files: Iterable[Path]) -> str:
    """Digest of the contents of files, one after the other; their names and times decide nothing.

    It is remembered in the cache until a file is touched (size, identity, and the time of the last change that no program can set back).
    """
    paths = list(files)
    stats = [path.stat() for path in paths]
    seen = [(str(path.absolute()), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in zip(paths, stats, strict=True)]
    place = directory() / "contents" / blake3(json.dumps(seen).encode()).hexdigest()[:32]
    with contextlib.suppress(OSError):
        return place.read_text()
    found = blake3()
    for path in paths:
        found.update(blake3(max_threads=blake3.AUTO).update_mmap(path).digest())
    if time.time() - max((stat.st_ctime for stat in stats), default=0.0) > _RACY:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
            place.parent.mkdir(parents=True, exist_ok=True)
            beside = place.with_suffix(f".{uuid.uuid4().hex[:8]}")
            beside.write_text(found.hexdigest())
            beside.rename(place)
    return found.hexdigest()


@contextlib.contextmanager
def _hidden(path: Path) -> Iterator[Path]:
    """A new hidden directory beside `path`, locked for as long as this process works in it, and gone afterwards."""
    while True:
        hidden = path.parent / f".{path.name}-{uuid.uuid4().hex[:8]}"
        hidden.mkdir()
        with _locked(hidden) as mine:
            if not mine or not hidden.exists():
                continue  # somebody who sweeps came between the two
            try:
                yield hidden
            finally:
                shutil.rmtree(hidden, ignore_errors=True)
            return


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether this process alone holds a directory; the lock ends with the process, however it ends."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)


def _sweep(path: Path) -> None:
    """Remove what processes that are gone have left beside `path`."""
    ours = path.is_relative_to(directory())
    for folder in path.parent.glob(".*-*"):
        named = _HIDDEN.fullmatch(folder.name)
        if named is None or not folder.is_dir() or not (ours or named["name"] == path.name):
            continue
        with _locked(folder) as left:
            if left:
                shutil.rmtree(folder, ignore_errors=True)
