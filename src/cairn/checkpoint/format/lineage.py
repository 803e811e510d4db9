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

from pydantic import field_validator

from cairn import native
from cairn.checkpoint.format.kinds import Whole
from cairn.checkpoint.format.place import follow, permitted, sizes, way
from cairn.options import Options

if TYPE_CHECKING:
    from cairn.checkpoint.format.read import Checkpoint


class Parent(Options):
    """A checkpoint that this one was made from."""

    digest: str
    path: str | None = None
    """Where it lay, relative to the directory that holds the child; a hint, not a truth."""
    step: Whole | None = None
    bytes: Whole | None = None
    """Bytes of its files, where it had no manifest: a directory of another size need not be read to know that it is another."""


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

    @field_validator("options")
    @classmethod
    def _recipe_is_a_mapping(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name, known in (("recipe", options.get("recipe")), ("recipe.data", _within(options, "recipe", "data"))):
            if known is not None and not isinstance(known, dict):
                raise ValueError(f"{name} is not a mapping")
        for name, stage in (("stage", options.get("stage")), ("recipe.stage", _within(options, "recipe", "stage"))):
            if stage is not None and not isinstance(stage, str):
                raise ValueError(f"{name} is not a name")
        return options

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe with which it was trained; empty where it is not known."""
        return self.options.get("recipe") or {}

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
            parents=[Parent(digest=p.digest, path=_hint(p.path, directory), step=p.step, bytes=None if p.is_ours else _bytes_in(p.path)) for p in parents],
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
    found["processor"], found["kernels"] = native.processor_name(), native.compiler()
    found["processes"] = int(os.environ.get("WORLD_SIZE") or 1)
    torch = sys.modules.get("torch")
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        found["instructions"] = torch.backends.cpu.get_cpu_capability()
        found["native"] = native.loaded()
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
            found["cuda"] = torch.version.cuda
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
    """The parent of the checkpoint at `child`: at its hinted path, else among the child's neighbours; the digest decides.

    A plain directory is digested only where the number of its bytes is that of the parent. A hint that is a URL is passed over unless it may be
    opened (`place.permitted`).
    """
    from cairn.checkpoint.format import read
    from cairn.errors import CairnError

    home = child.resolve().parent
    hinted: list[str | Path] = [parent.path] if parent.path and ("://" not in parent.path or permitted(parent.path)) else []
    beside = (path for path in sorted(home.iterdir()) if path.is_dir() and not path.name.startswith("."))
    for path in itertools.chain(hinted, beside):
        try:
            candidate = read.open(follow(home, path) if isinstance(path, str) else path)
            if (candidate.is_ours or parent.bytes == _bytes_in(candidate.path)) and candidate.digest == parent.digest:
                return candidate
        except (CairnError, OSError, ValueError):  # ValueError: a hint that is no path, such as one with a zero byte
            continue  # not a checkpoint, or no longer readable: not the parent that we look for
    return None


def _bytes_in(directory: Path) -> int:
    return sum(size for name, size in sizes(directory).items() if not name.startswith("."))


def _within(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _hint(path: Path, directory: Path | None) -> str:
    return way(path, directory) if directory is not None else str(path.resolve())
