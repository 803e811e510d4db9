"""What every machine with Python has: the files of this installation, as material for corpora."""

from __future__ import annotations

import os
import platform
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from cairn import cache

Part = Literal["installation", "standard-library"]
"""The standard library with all installed packages, or the library alone, which changes only with the version of Python."""

_SKIPPED = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "testing", "idle_test", "node_modules", "cairn", "lib2to3"}


def roots() -> list[Path]:
    """The standard library, then installed packages."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(Path(paths[key]) for key in ("stdlib", "purelib", "platlib")))


def python_files(part: Part = "installation") -> Iterator[tuple[str, Path]]:
    """(name relative to its root, path) of each Python source file of the installation or of the standard library alone, sorted, tests left out."""
    library = roots()[0]
    for root in roots() if part == "installation" else [library]:
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(name for name in folders if name not in _SKIPPED and not name.endswith((".dist-info", ".egg-info")))
            if part == "standard-library" and Path(folder) == library:  # distributions and machines add files of their own here
                folders[:] = [name for name in folders if name in sys.stdlib_module_names]
                files = [name for name in files if name.removesuffix(".py") in sys.stdlib_module_names]
            for name in sorted(files):
                if name.endswith(".py"):
                    path = Path(folder) / name
                    yield str(path.relative_to(root)), path


def fingerprint(part: Part = "installation") -> list[object]:
    """Changes with the version of Python and with the contents of the files."""
    named = list(python_files(part))
    return [sys.version, [name for name, _ in named], cache.contents(path for _, path in named)]


def described(part: Part) -> dict[str, str]:
    """Origin and license of the texts of a part."""
    if part == "standard-library":
        return {"origin": f"standard library of Python {platform.python_version()}", "license": "PSF-2.0"}
    return {"origin": "this Python installation", "license": "PSF-2.0 (standard library) and the licenses of the installed packages"}


def read(path: Path) -> str | None:
    """The text of a source file, or None if it is not UTF-8 or is empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    return text if text.strip() else None
