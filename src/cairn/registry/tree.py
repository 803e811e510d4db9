"""Verifying a whole tree: every byte of every checkpoint, and whether each descent can be walked."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cairn.checkpoint.format import read, verify
from cairn.checkpoint.format.place import place
from cairn.checkpoint.format.sound import VerifyReport
from cairn.checkpoint.saving.disk import left_behind
from cairn.errors import DamagedError, NotFoundError
from cairn.registry import scan
from cairn.registry.descent import in_circles


@dataclass
class TreeReport:
    """What was found under a folder. Damage makes a tree unsound; a parent that lies elsewhere is only said."""

    path: Path
    reports: list[VerifyReport] = field(default_factory=list)
    unpinned: list[Path] = field(default_factory=list)
    """Plain directories of transformers: nothing says which bytes were meant."""
    absent: dict[Path, list[str]] = field(default_factory=dict)
    """Digests of parents that are not under the folder."""
    left_behind: list[Path] = field(default_factory=list)
    """Hidden folders of writers that no longer live; the next one that writes there removes them."""
    circles: list[Path] = field(default_factory=list)
    """Checkpoints whose lineage leads back to themselves."""

    @property
    def bytes(self) -> int:
        return sum(report.bytes for report in self.reports)

    @property
    def sound(self) -> bool:
        return all(report.sound for report in self.reports) and not self.circles


def verify_all(folder: str | Path, progress: Callable[[str], object] | None = None) -> TreeReport:
    """Read every byte of every checkpoint under a folder and compare it with its manifest. Raises `NotFoundError` if there is none."""
    root = place(folder)
    if not root.is_dir():
        raise NotFoundError(f"There is no folder {root}.")
    found = TreeReport(root)
    edges: list[tuple[str, str]] = []
    homes: dict[str, Path] = {}
    places = [item for item in scan.places(root) if item.kind != "run"]
    if not places:
        raise NotFoundError(f"There is no checkpoint under {root}.")
    for item in places:
        if progress is not None:
            progress(f"{item.path}")
        if item.kind == "foreign":
            found.unpinned.append(item.path)
            continue
        report = verify.verify(item.path)
        found.reports.append(report)
        if report.digest is None:
            continue
        homes[report.digest] = item.path
        try:
            origin = read.open(item.path).lineage
        except DamagedError:
            continue  # already in the report
        edges += [(report.digest, parent.digest) for parent in (origin.parents if origin else []) if parent.digest != report.digest]
    for child, parent in edges:
        if parent not in homes:
            found.absent.setdefault(homes[child], []).append(parent)
    found.left_behind = sorted({path for folder, _, _ in os.walk(root) for path in left_behind(folder)})
    found.circles = [homes[digest] for digest in in_circles(edges) if digest in homes]
    return found


def size_of(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
