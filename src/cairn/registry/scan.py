"""Finding runs and checkpoints under a folder: one pass over the directories, nothing opened but what has changed.

Symbolic links are not followed: what is indexed lies inside the folders that were named.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from blake3 import blake3

from cairn.checkpoint.manifest import LINEAGE, MANIFEST
from cairn.checkpoint.read import CHECKPOINTS

_PASSED = {"__pycache__", "node_modules", "site-packages", "results", "statements"}


@dataclass(frozen=True)
class Place:
    """A directory that is something, and a fingerprint that changes when its files do."""

    path: Path
    kind: Literal["run", "checkpoint", "foreign"]
    fingerprint: str


def places(root: Path) -> Iterator[Place]:
    """Every run, checkpoint and plain transformers directory at and under `root`; a checkpoint is not searched further."""
    todo = [root]
    while todo:
        folder = todo.pop()
        try:
            entries = {entry.name: entry for entry in os.scandir(folder)}
        except OSError:
            continue  # gone, or not for us to read
        if MANIFEST in entries:
            yield Place(folder, "checkpoint", _fingerprint(folder, [entries[MANIFEST], *(entries[n] for n in (LINEAGE,) if n in entries)], len(entries)))
            continue
        if "config.json" in entries and any(name.endswith(".safetensors") for name in entries) and not {"trainer.json", LINEAGE} & set(entries):
            yield Place(folder, "foreign", _fingerprint(folder, [entries[name] for name in sorted(entries)], len(entries)))
            continue
        inner = [e for name, e in entries.items() if not name.startswith(".") and name not in _PASSED and e.is_dir(follow_symlinks=False)]
        if "recipe.yaml" in entries and entries["recipe.yaml"].is_file(follow_symlinks=False) and any(entry.name == CHECKPOINTS for entry in inner):
            yield Place(folder, "run", _fingerprint(folder, [entries[n] for n in ("recipe.yaml", "metrics.jsonl") if n in entries], 0))
        todo += [Path(entry.path) for entry in sorted(inner, key=lambda entry: entry.name, reverse=True)]


def _fingerprint(folder: Path, entries: list[os.DirEntry[str]], count: int) -> str:
    parts: list[object] = [count]
    for entry in entries:
        try:
            stat = entry.stat(follow_symlinks=False)
        except OSError:
            continue
        parts.append((entry.name, stat.st_size, stat.st_mtime_ns, stat.st_ino))
    home = folder.parent.parent if folder.parent.name == CHECKPOINTS else folder.parent
    parts.append(folder_time(home / "statements"))
    return blake3(repr(parts).encode()).hexdigest()[:32]


def folder_time(folder: Path) -> int:
    """When something was last put into a folder or taken out of it; 0 if there is none."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0
