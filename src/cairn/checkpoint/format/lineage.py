"""Lineage: where a checkpoint comes from.

Each checkpoint names its parents by digest; a path is only a hint for finding them. What made it (a run with its whole
resolved recipe, an operation with its options), what was changed on purpose, with which versions, on which hardware
and when, stands in lineage.json.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from pydantic import field_validator

from cairn import native
from cairn.checkpoint.format.kinds import Whole
from cairn.checkpoint.format.place import sizes, way
from cairn.options import Options


class Recorded(Protocol):
    """What lineage notes of a parent; a `Checkpoint` has it."""

    @property
    def path(self) -> Path: ...
    @property
    def digest(self) -> str: ...
    @property
    def step(self) -> int | None: ...
    @property
    def is_ours(self) -> bool: ...


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
        parents: Sequence[Recorded] = (),
        options: dict[str, Any] | None = None,
        changed: Sequence[str] = (),
        directory: Path | None = None,
    ) -> Lineage:
        """A lineage made now, on this machine. `directory` will hold the child; parents' paths are noted relative to it."""
        return cls(
            kind=kind,
            name=name,
            parents=[Parent(digest=p.digest, path=_hint(p.path, directory), step=p.step, bytes=None if p.is_ours else bytes_in(p.path)) for p in parents],
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


def bytes_in(directory: Path) -> int:
    """Bytes of the files of a directory, hidden ones left out."""
    return sum(size for name, size in sizes(directory).items() if not name.startswith("."))


def _within(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _hint(path: Path, directory: Path | None) -> str:
    return way(path, directory) if directory is not None else str(path.resolve())
