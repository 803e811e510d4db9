"""The catalog: every pluggable thing of every kind, found by name.

A method is one file in its room; at the bottom of the file a decorator registers it:

    @register("operation", "linear", paper=Paper("Model soups", 2203.05482))
    class Linear(Options): ...

Nothing is imported until it is asked for: `get("operation", "linear")` first tries the file that bears the
method's name in the rooms of that kind and only then looks through the rooms. A lower floor meets a higher one
only here, by name, never by import.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from cairn.errors import NotFoundError, suggestion


@dataclass(frozen=True)
class Kind:
    """A kind of pluggable thing: its `group` (one of the three kinds of the design, or 'part') and its rooms (packages)."""

    name: str
    group: str
    rooms: tuple[str, ...]
    summary: str


KINDS = {
    kind.name: kind
    for kind in (
        Kind("operation", "operation", ("cairn.merging.methods",), "checkpoints (and data) to a new checkpoint"),
        Kind("growth", "operation", ("cairn.growth.methods",), "a checkpoint to a larger one"),
        Kind("field", "ingredient", ("cairn.training.fields", "cairn.fields"), "what a sample is: text, images"),
        Kind("adaptation", "operation", ("cairn.adaptation.methods",), "an adapter and its base to a whole model"),
        Kind("compression", "operation", ("cairn.compression.methods",), "a checkpoint and texts to a sparser or smaller one"),
        Kind("objective", "ingredient", ("cairn.training.objectives", "cairn.fields"), "what the loss is"),
        Kind("optimizer", "ingredient", ("cairn.training.optimizers",), "how gradients change the weights"),
        Kind("schedule", "ingredient", ("cairn.training.schedules",), "learning rate as a pure function of tokens"),
        Kind("filter", "ingredient", ("cairn.data.filters",), "which training sequences count in the loss"),
        Kind("reweighting", "ingredient", ("cairn.training.reweighting",), "how much each sequence of a batch counts"),
        Kind("callback", "ingredient", ("cairn.training.callbacks",), "what must happen at a moment of training"),
        Kind("adapter", "ingredient", ("cairn.models.adapters",), "what is trained beside frozen weights"),
        Kind("measurement", "measurement", ("cairn.evaluation.measurements", "cairn.fields"), "checkpoint (and data) to numbers"),
        Kind("study", "study", ("cairn.studies",), "a runnable claim of a paper, with a negative control"),
        Kind("architecture", "part", ("cairn.models.families", "cairn.fields"), "a family of models with Hugging Face names"),
        Kind("layout", "part", ("cairn.checkpoint.foreign.layouts",), "how another program lays a checkpoint out on disk"),
        Kind("corpus", "part", ("cairn.data.corpora",), "where documents come from"),
    )
}


@dataclass(frozen=True)
class Paper:
    """A published source: `title`, its arXiv number or address if known, and the card number by which studies go."""

    title: str
    reference: str = ""
    card: int | None = None


@dataclass(frozen=True)
class Entry:
    """One registered method: `implementation` is its options class, which is also what does the work."""

    kind: str
    name: str
    implementation: Any
    summary: str
    papers: tuple[Paper, ...]

    @property
    def group(self) -> str:
        return KINDS[self.kind].group


_entries: dict[tuple[str, str], Entry] = {}
_searched: set[str] = set()
T = TypeVar("T")


def register(kind: str, name: str, *, paper: Paper | tuple[Paper, ...] = ()) -> Callable[[T], T]:
    """Class decorator that enters an options class into the catalog under `name`. Its docstring's first line is the summary."""
    if kind not in KINDS:
        raise ValueError(f"no kind '{kind}'")

    def enter(implementation: T) -> T:
        summary = (getattr(implementation, "__doc__", None) or "").strip().split("\n")[0]
        papers = (paper,) if isinstance(paper, Paper) else paper
        known = _entries.get((kind, name))
        if known is not None and known.implementation.__qualname__ != getattr(implementation, "__qualname__", None):
            raise ValueError(f"{kind} '{name}' is registered twice")
        _entries[kind, name] = Entry(kind, name, implementation, summary, papers)
        return implementation

    return enter


def get(kind: str, name: str) -> Entry:
    """The entry of that name. Raises `NotFoundError` that names the nearest one."""
    if (kind, name) not in _entries:
        for room in KINDS[kind].rooms:
            module = f"{room}.{name.replace('-', '_')}"
            if name.replace("-", "_").isidentifier() and importlib.util.find_spec(module) is not None:
                importlib.import_module(module)
    if (kind, name) not in _entries:
        _search(kind)
    if (kind, name) not in _entries:
        raise NotFoundError(f"There is no {kind} '{name}'.{suggestion(name, names(kind))}")
    return _entries[kind, name]


def names(kind: str) -> list[str]:
    """All names of a kind, sorted."""
    _search(kind)
    return sorted(name for entry_kind, name in _entries if entry_kind == kind)


def entries(kind_or_group: str | None = None) -> list[Entry]:
    """All entries of a kind or of a group (operation, ingredient, measurement, study, part), or of everything."""
    chosen = [k for k in KINDS.values() if kind_or_group in (None, k.name, k.group)]
    if not chosen:
        groups = {k.group for k in KINDS.values()} | set(KINDS)
        raise NotFoundError(f"There is no kind '{kind_or_group}'.{suggestion(str(kind_or_group), groups)}")
    return [get(kind.name, name) for kind in chosen for name in names(kind.name)]


def name_of(method: Any) -> str | None:
    """The name under which the class of a configured method is registered, or None."""
    for entry in _entries.values():
        if entry.implementation is type(method):
            return entry.name
    return None


def _search(kind: str) -> None:
    if kind in _searched:
        return
    for room in KINDS[kind].rooms:
        package = importlib.import_module(room)
        for module in pkgutil.walk_packages(package.__path__, f"{room}."):
            if _registers(module.name, kind):
                importlib.import_module(module.name)
    _searched.add(kind)


def _registers(module: str, kind: str) -> bool:
    """Whether a module registers something of a kind. Its text is searched: a room of several kinds is not imported for one of them."""
    spec = importlib.util.find_spec(module)
    source = spec.loader.get_source(module) if spec is not None and isinstance(spec.loader, importlib.abc.InspectLoader) else None
    return source is None or re.search(rf"@register\(\s*[\"']{kind}[\"']", source) is not None
