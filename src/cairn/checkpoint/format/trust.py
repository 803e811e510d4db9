"""What a user has named, so that files may name it too: stores, data, the keepers of a run.

A file that somebody else wrote may name anything; nothing is opened because of that (`place.permitted`). What the user named when a run
was begun is noted in a directory of the user's own, so that the user's runs can be read and resumed without being asked again. Trust is in
the thing that was named, not in the directory that names it: a run whose files were changed to name another store is a stranger's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from blake3 import blake3

Named = Literal["store", "data", "keepers"]

_here: set[tuple[Named, str]] = set()
_everything = False


def directory() -> Path:
    """Where it is noted: `$CAIRN_STATE`, else `$XDG_STATE_HOME/cairn`, else `~/.local/state/cairn`."""
    named = os.environ.get("CAIRN_STATE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "cairn"


def note(kind: Named, what: str) -> None:
    """The user has named this: it is known from now on, and where the directory can be written, in later processes too."""
    _here.add((kind, what))
    file = _file(kind, what)
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            file.write_text(f"{what}\n", encoding="utf-8")
    except OSError:
        return  # a home that cannot be written: this process knows


def allow(kind: Named, what: str) -> None:
    """For this process alone."""
    _here.add((kind, what))


def allow_everything() -> None:
    """For this process alone: the user has asked to follow whatever files name."""
    global _everything
    _everything = True


def known(kind: Named, what: str) -> bool:
    """Whether the user has named this, or allowed it in this process."""
    return _everything or (kind, what) in _here or _file(kind, what).is_file()


@contextlib.contextmanager
def following() -> Iterator[None]:
    """Inside, whatever files name is opened: for work on runs of one's own, as studies do."""
    global _everything
    before, _everything = _everything, True
    try:
        yield
    finally:
        _everything = before


def _file(kind: Named, what: str) -> Path:
    return directory() / kind / blake3(what.encode("utf-8", "replace")).hexdigest()[:32]
