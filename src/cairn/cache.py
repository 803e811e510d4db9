"""The user's cache: what was fetched or prepared once. Safe to delete at any time."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


def directory() -> Path:
    """`$CAIRN_CACHE`, else `$XDG_CACHE_HOME/cairn`, else `~/.cache/cairn`."""
    named = os.environ.get("CAIRN_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cairn"


def publish(path: Path, fill: Callable[[Path], object]) -> None:
    """Make the directory `path` by filling a hidden one beside it and renaming: it is there whole or not at all.

    When two processes do the same at once, the first to finish wins and the other's work is dropped.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.parent / f".{path.name}-{uuid.uuid4().hex[:8]}"
    hidden.mkdir()
    try:
        fill(hidden)
        try:
            hidden.rename(path)
        except OSError:
            if not path.exists():
                raise
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
