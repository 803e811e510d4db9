"""What every machine with Python has: the files of this installation, as material for corpora."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_SKIPPED = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "testing", "idle_test", "node_modules", "cairn", "lib2to3"}


def roots() -> list[Path]:
    """The standard library, then installed packages."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(Path(paths[key]) for key in ("stdlib", "purelib", "platlib")))


def python_files() -> Iterator[tuple[str, Path]]:
    """(name relative to its root, path) of each Python source file, sorted, tests left out."""
    for root in roots():
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(name for name in folders if name not in _SKIPPED and not name.endswith((".dist-info", ".egg-info")))
            for name in sorted(files):
                if name.endswith(".py"):
                    path = Path(folder) / name
                    yield str(path.relative_to(root)), path


def fingerprint() -> list[object]:
    """Changes with the Python version and with the installed files."""
    return [sys.version, [(name, path.stat().st_size) for name, path in python_files()]]


def read(path: Path) -> str | None:
    """The text of a source file, or None if it is not UTF-8 or is empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    return text if text.strip() else None
