"""Lineage: where a checkpoint comes from.

Each checkpoint names its parents by digest; a path is only a hint for finding them. What made it (a run with its whole
resolved recipe, an operation with its options), what was changed on purpose, with which versions, on which hardware
and when, stands in lineage.json.
"""

from __future__ import annotations

import itertools
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cairn import native
from cairn.checkpoint.format.place import follow, way
from cairn.options import Options

if TYPE_CHECKING:
    from cairn.checkpoint.format.read import Checkpoint


class Parent(Options):
    """A checkpoint that this one was made from."""

    digest: str
    path: str | None = None
    """Where it lay, relative to the directory that holds the child; a hint, not a truth."""
    step: int | None = None


class Lineage(Options):
    """What lineage.json says."""

    kind: str
    """`run`, `operation` or `import`."""
    name: str
    """The act: `train`, `resume`, `fork`, or the operation's name."""
    parents: list[Parent] = []
    options: dict[str, Any] = {}
    """The operation's options, or the run's resolved recipe under `recipe`."""
    changed: list[str] = []
    """What differs from the parent on purpose, one plain line each."""
    versions: dict[str, str] = {}
    hardware: dict[str, Any] = {}
    created: str = ""

    @classmethod
    def record(
        cls,
        kind: str,
        name: str,
        *,
        parents: Sequence[Checkpoint] = (),
        options: dict[str, Any] | None = None,
        changed: Sequence[str] = (),
        directory: Path | None = None,
    ) -> Lineage:
        """A lineage made now, on this machine. `directory` will hold the child; parents' paths are noted relative to it."""
        return cls(
            kind=kind,
            name=name,
            parents=[Parent(digest=p.digest, path=_hint(p.path, directory), step=p.step) for p in parents],
            options=options or {},
            changed=list(changed),
            versions=versions(),
            hardware=hardware(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def versions() -> dict[str, str]:
    """Versions of Python, cairn and what computes."""
    found = {"python": platform.python_version()}
    for name in ("cairn-lm", "torch", "numpy", "safetensors", "tokenizers", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The machine as far as it can matter for bits and speed."""
    found: dict[str, Any] = {"machine": platform.machine(), "system": platform.system(), "cores": os.cpu_count()}
    found["processes"] = int(os.environ.get("WORLD_SIZE", "1"))
    torch = sys.modules.get("torch")
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        found["native"] = native.loaded()
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found


def ancestors(checkpoint: Checkpoint) -> Iterator[tuple[int, Parent, Checkpoint | None]]:
    """Walk the whole descent, nearest first: (generations back, parent, the checkpoint if it can still be found)."""
    seen = {checkpoint.digest}
    level: list[Checkpoint] = [checkpoint]
    depth = 0
    while level:
        depth += 1
        following = []
        for child in level:
            for parent in child.lineage.parents if child.lineage else []:
                if parent.digest in seen:
                    continue
                seen.add(parent.digest)
                found = find(parent, child.path)
                yield depth, parent, found
                if found is not None:
                    following.append(found)
        level = following


def find(parent: Parent, child: Path) -> Checkpoint | None:
    """The parent of the checkpoint at `child`: at its hinted path, else among the child's neighbours; the digest decides."""
    from cairn.checkpoint.format import read
    from cairn.errors import CairnError

    home = child.resolve().parent
    hinted = [follow(home, parent.path)] if parent.path else []
    beside = (path for path in sorted(home.iterdir()) if path.is_dir() and not path.name.startswith("."))
    for path in itertools.chain(hinted, beside):
        try:
            candidate = read.open(path)
        except (CairnError, OSError):
            continue  # not a checkpoint, or no longer readable: not the parent that we look for
        if candidate.digest == parent.digest:
            return candidate
    return None


def _hint(path: Path, directory: Path | None) -> str:
    return way(path, directory) if directory is not None else str(path.resolve())
