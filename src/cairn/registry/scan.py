"""Finding runs and checkpoints under a folder, and the small files beside them: one pass over the directories, nothing opened but what has changed.

Symbolic links are not followed: what is indexed lies inside the folders that were named.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3

from cairn.checkpoint.format import documents
from cairn.checkpoint.format.manifest import LINEAGE, MANIFEST
from cairn.checkpoint.format.read import CHECKPOINTS
from cairn.errors import CairnError, DamagedError, InputError
from cairn.evaluation import results
from cairn.registry.record import run_of

_PASSED = {"__pycache__", "node_modules", "site-packages", "results", "statements"}


@dataclass(frozen=True)
class ScannedFolder:
    """A directory that is something, and a fingerprint that changes when its files do."""

    path: Path
    kind: Literal["run", "checkpoint", "foreign"]
    fingerprint: str


def places(root: Path) -> Iterator[ScannedFolder]:
    """Every run, checkpoint and plain transformers directory at and under `root`; a checkpoint is not searched further."""
    todo = [root]
    while todo:
        folder = todo.pop()
        try:
            entries = {entry.name: entry for entry in os.scandir(folder)}
        except OSError:
            continue  # gone, or not for us to read
        if MANIFEST in entries:
            yield ScannedFolder(
                folder, "checkpoint", _fingerprint(folder, [entries[MANIFEST], *(entries[n] for n in (LINEAGE,) if n in entries)], len(entries))
            )
            continue
        if "config.json" in entries and any(name.endswith(".safetensors") for name in entries) and not {"trainer.json", LINEAGE} & set(entries):
            yield ScannedFolder(folder, "foreign", _fingerprint(folder, [entries[name] for name in sorted(entries)], len(entries)))
            continue
        inner = [e for name, e in entries.items() if not name.startswith(".") and name not in _PASSED and e.is_dir(follow_symlinks=False)]
        if "recipe.yaml" in entries and entries["recipe.yaml"].is_file(follow_symlinks=False) and any(entry.name == CHECKPOINTS for entry in inner):
            yield ScannedFolder(folder, "run", _fingerprint(folder, [entries[n] for n in ("recipe.yaml", "metrics.jsonl") if n in entries], 0))
        todo += [Path(entry.path) for entry in sorted(inner, key=lambda entry: entry.name, reverse=True)]


def _fingerprint(folder: Path, entries: list[os.DirEntry[str]], count: int) -> str:
    parts: list[object] = [count]
    for entry in entries:
        try:
            stat = entry.stat(follow_symlinks=False)
        except OSError:
            continue
        parts.append((entry.name, stat.st_size, stat.st_mtime_ns, stat.st_ino))
    parts.append(folder_time(home_of(folder) / "statements"))
    return blake3(repr(parts).encode()).hexdigest()[:32]


def folder_time(folder: Path) -> int:
    """When something was last put into a folder or taken out of it; 0 if there is none."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


def home_of(path: Path) -> Path:
    """Where the results of a checkpoint lie: its run, or the folder around it."""
    return run_of(path) or path.parent


def refuse_ways_out(root: Path, folder: Path) -> None:
    """Raise `InputError` for a link that leads out of the indexed folder: what is shown lies inside."""
    for entry in folder.iterdir():
        if entry.is_symlink() and not entry.resolve().is_relative_to(root):
            raise InputError(f"'{entry.name}' is a link that leads out of the indexed folder")


def results_in(folder: Path) -> tuple[list[tuple[Any, ...]], dict[Path, str]]:
    """Rows of every result file of a folder, and what is wrong with those that cannot be read."""
    rows: list[tuple[Any, ...]] = []
    problems: dict[Path, str] = {}
    for path, kept in results.within(folder):
        if isinstance(kept, DamagedError):
            problems[path] = str(kept).removeprefix(f"{path}: ").removeprefix(f"{path} ")
            continue
        for score in kept.scores:
            if not math.isfinite(score.value):
                problems[path] = f"its {score.metric} is no finite number"
                continue
            stderr = score.stderr if math.isfinite(score.stderr) else None
            rows.append((kept.model_digest, score.task, score.metric, score.value, stderr, score.n, score.chance, json.dumps(kept.protocol)))
    return rows, problems


def folder_fingerprint(folder: Path) -> str:
    """What changes when a file of a folder is added, taken away or written again."""
    try:
        entries = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in os.scandir(folder))
    except OSError:
        return ""
    return blake3(repr(entries).encode()).hexdigest()[:32]


def last_row(path: Path, reach: int = 2**16) -> dict[str, Any]:
    """The last whole row of metrics.jsonl, without reading what comes before."""
    try:
        with os.fdopen(documents.open_file(path), "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - reach))
            lines = file.read().split(b"\n")[:-1]
        row = documents.parse(lines[-1], path)
    except (OSError, CairnError, IndexError):
        return {}
    return {name: value for name, value in row.items() if results.is_number(value)} if isinstance(row, dict) else {}


def length_of(recipe: dict[str, Any]) -> tuple[str, int | None]:
    """What a run counts (tokens, samples), and its length in that, from its recipe; None where it does not say."""
    from cairn.options import UNITS, Amount

    unit = UNITS[0]
    try:
        training = recipe["training"]
        unit = next(unit for unit in UNITS if unit in training)
        total = Amount.parse(training[unit]).units(int(training["batch"]))
        return unit, total if results.is_number(total) else None
    except (KeyError, TypeError, ValueError, OverflowError, StopIteration, InputError):
        return unit, None
