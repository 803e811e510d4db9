"""Verification: every block of every file against the manifest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cairn.checkpoint.format import read
from cairn.checkpoint.format.manifest import MANIFEST
from cairn.checkpoint.format.place import place
from cairn.checkpoint.format.sound import VerifyReport, check
from cairn.errors import NotFoundError


def verify(path: str | Path, progress: Callable[[int], object] | None = None, *, follow: bool = False) -> VerifyReport:
    """Read every byte of the checkpoint (or of a run's newest) and compare it with its manifest.

    `progress` is told the bytes read so far, file by file; `follow` allows a run to name the store where its checkpoints lie. Damage is
    reported, not raised; `NotFoundError` only if there is nothing to verify.
    """
    path = place(path)
    if path.is_dir() and not (path / MANIFEST).exists() and read.is_run(path):
        complete = read.list_checkpoints(path, follow=follow)
        if not complete:
            raise NotFoundError(f"The run {path} has no complete checkpoint yet.")
        path = complete[-1]
    if not path.is_dir():
        raise NotFoundError(f"There is no checkpoint at {path}.")
    return check(path, progress)
