"""The catalog: every pluggable thing of every kind, found by name.

A method is one file in its room; at the bottom of the file a decorator registers it:

    @register("operation", "linear", paper=Paper("Model soups", "arXiv:2203.05482"))
    class LinearMerge(Operation): ...

The parent class of a kind says which kind it is (`catalog_kind = "operation"`) and stands for it wherever a method is asked for:
`get(Operation, "linear")` is an `Entry[Operation]`, `configure(Operation, {"name": "linear"})` an `Operation`, so that a type checker
and a reader can follow the parent into the method. A lower floor meets a higher one only here, by name, never by import.

Nothing is imported until it is used: names and summaries of the package's own methods come from the generated index `catalog.json`
(`tools/catalog_index.py` writes it), and only `Entry.implementation` imports the method's module. Other packages register methods
through the entry-point group `cairn.methods`: each entry point names a module that calls `register` when it is loaded.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from cairn.errors import NotFoundError, suggestion

ENTRY_POINTS = "cairn.methods"
"""The entry-point group through which other packages register methods."""
INDEX = "catalog.json"


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

PARENTS = {
    "operation": "cairn.checkpoint.operating.stream:Operation",
    "growth": "cairn.growth.frame:Growth",
    "field": "cairn.training.fields:DataField",
    "objective": "cairn.training.objectives:Objective",
    "optimizer": "cairn.training.optimizers:Optimizer",
    "schedule": "cairn.training.schedules:Schedule",
    "filter": "cairn.data.filters:Filter",
    "reweighting": "cairn.training.reweighting:Reweighting",
    "callback": "cairn.training.callbacks:Callback",
    "measurement": "cairn.evaluation.measure:Measurement",
    "study": "cairn.studies.study:Study",
    "architecture": "cairn.models.config:Network",
    "adaptation": "cairn.adaptation:Adaptation",
    "compression": "cairn.compression:Compression",
    "adapter": "cairn.models.adapters:Adapter",
    "layout": "cairn.checkpoint.foreign.layouts:Layout",
    "corpus": "cairn.data.corpora:Corpus",
}
"""`module:Class` of each kind's parent class, which states the interface that every method of the kind has."""

M = TypeVar("M")
T = TypeVar("T")


@dataclass(frozen=True)
class Paper:
    """A published source: `title`, its arXiv number or address if known, and the card number by which studies go."""

    title: str
    reference: str = ""
    card: int | None = None


@dataclass(frozen=True)
class Entry(Generic[M]):
    """One registered method; reading `implementation` imports its module."""

    kind: str
    name: str
    module: str
    summary: str
    papers: tuple[Paper, ...] = ()

    @property
    def group(self) -> str:
        """The group of its kind: operation, ingredient, measurement, study or part."""
        return KINDS[self.kind].group

    @property
    def implementation(self) -> type[M]:
        """The options class, which is also what does the work."""
        if (self.kind, self.name) not in _classes:
            importlib.import_module(self.module)
        if (self.kind, self.name) not in _classes:
            raise NotFoundError(f"{self.module} no longer registers the {self.kind} '{self.name}'; tools/catalog_index.py writes the index anew.")
        return _classes[self.kind, self.name]


_entries: dict[tuple[str, str], Entry[Any]] = {}
_classes: dict[tuple[str, str], type[Any]] = {}
_names: dict[type[Any], str] = {}
_failures: dict[str, str] = {}
"""Entry points of other packages that could not be loaded, and why."""


def register(kind: str, name: str, *, paper: Paper | tuple[Paper, ...] = ()) -> Callable[[type[T]], type[T]]:
    """Class decorator that enters a method into the catalog.

    Parameters
    ----------
    kind
        A key of `KINDS`.
    name
        The name by which recipes and commands ask for the method.
    paper
        Where the method was published.

    Raises
    ------
    ValueError
        For an unknown kind, a name that another class has, or a class that is no child of the kind's parent: mistakes of a programmer.

    Examples
    --------
    >>> from cairn.training.schedules import Schedule
    >>> @register("schedule", "half")
    ... class Half(Schedule):
    ...     "Half of the rate, always."
    ...     def shape(self, tokens, horizon):
    ...         return 0.5
    """
    if kind not in KINDS:
        raise ValueError(f"no kind '{kind}'")

    def enter(implementation: type[T]) -> type[T]:
        declared = getattr(implementation, "catalog_kind", None)
        if kind in PARENTS and declared != kind:
            raise ValueError(f"{kind} '{name}' is no child of {PARENTS[kind]} (its parent's kind is {declared})")
        known = _classes.get((kind, name))
        if known is not None and (known.__module__, known.__qualname__) != (implementation.__module__, implementation.__qualname__):
            raise ValueError(f"{kind} '{name}' is registered twice")
        summary = (implementation.__doc__ or "").strip().split("\n")[0]
        papers = (paper,) if isinstance(paper, Paper) else paper
        _entries[kind, name] = Entry(kind, name, implementation.__module__, summary, papers)
        _classes[kind, name] = implementation
        _names[implementation] = name
        return implementation

    return enter


@overload
def get(kind: str, name: str) -> Entry[Any]: ...
@overload
def get(kind: type[M], name: str) -> Entry[M]: ...
def get(kind: str | type[M], name: str) -> Entry[Any]:
    """The entry of that name; `kind` is its name or its parent class. Raises `NotFoundError` that names the nearest one."""
    word = kind_name(kind)
    found = _find(word, name)
    if found is None:
        broken = "".join(f" {where} could not be loaded: {why}." for where, why in _failures.items())
        raise NotFoundError(f"There is no {word} '{name}'.{suggestion(name, names(word))}{broken}")
    return found


def has(kind: str | type[Any], name: str) -> bool:
    """Whether there is a method of that name."""
    return _find(kind_name(kind), name) is not None


def names(kind: str | type[Any]) -> list[str]:
    """All names of a kind, sorted."""
    return [entry.name for entry in _of_kind(kind_name(kind))]


def listed(kind: str) -> str:
    """The names of a kind that the index has, for help texts: no other package is asked."""
    return ", ".join(sorted(_indexed(kind)))


@overload
def entries(kind: str | None = None) -> list[Entry[Any]]: ...
@overload
def entries(kind: type[M]) -> list[Entry[M]]: ...
def entries(kind: str | type[M] | None = None) -> list[Entry[Any]]:
    """All entries of a kind or of a group (operation, ingredient, measurement, study, part), or of everything.

    Parameters
    ----------
    kind
        The name of a kind or group, or the parent class of a kind; default: everything.

    Returns
    -------
    list of Entry
        By kind and name. Names, summaries and papers are there at once; `implementation` imports.

    Raises
    ------
    NotFoundError
        For a kind that does not exist.

    Examples
    --------
    >>> ", ".join(entry.name for entry in entries("optimizer"))
    'adamw'
    """
    if isinstance(kind, type):
        return list(_of_kind(kind_name(kind)))
    word = kind
    chosen = [each.name for each in KINDS.values() if word in (None, each.name, each.group)]
    if not chosen:
        groups = {each.group for each in KINDS.values()} | set(KINDS)
        raise NotFoundError(f"There is no kind '{word}'.{suggestion(str(word), groups)}")
    return [entry for each in chosen for entry in _of_kind(each)]


def named(name: str) -> list[Entry[Any]]:
    """The entries of that name, of whatever kind. Raises `NotFoundError` that names the nearest name, kind or group.

    Examples
    --------
    >>> [entry.kind for entry in named("cosine")]
    ['schedule']
    """
    every = entries()
    found = [entry for entry in every if entry.name == name]
    if not found:
        words = {*KINDS, *(kind.group for kind in KINDS.values()), *(entry.name for entry in every)}
        raise NotFoundError(f"There is no kind and no method '{name}'.{suggestion(name, words)}")
    return found


def registered(kind: str) -> list[Entry[Any]]:
    """The entries of a kind whose modules have been imported."""
    return [entry for (own, _), entry in sorted(_entries.items()) if own == kind]


def failures() -> dict[str, str]:
    """Entry points of other packages that could not be loaded, and why."""
    _load_others()
    return dict(_failures)


def name_of(method: Any) -> str | None:
    """The name under which the class of a configured method is registered, or None."""
    return _names.get(type(method))


def kind_name(kind: str | type[Any]) -> str:
    """The name of a kind that is given by its name or its parent class."""
    return kind if isinstance(kind, str) else str(kind.catalog_kind)


def parent(kind: str) -> type[Any]:
    """The parent class of a kind; imports its module."""
    module, _, name = PARENTS[kind].partition(":")
    found: type[Any] = getattr(importlib.import_module(module), name)
    return found


def _find(kind: str, name: str) -> Entry[Any] | None:
    """The entry of a name, looked for where it costs least first."""
    key = (kind, name)
    if key in _entries:
        return _entries[key]
    if (known := _indexed(kind).get(name)) is not None:
        return known
    if kind not in KINDS:
        return None
    _load_new(kind)
    if key not in _entries:
        _load_others()
    return _entries.get(key)


def _of_kind(kind: str) -> Iterator[Entry[Any]]:
    _load_new(kind)
    _load_others()
    yield from (entry for _, entry in sorted((_indexed(kind) | {entry.name: entry for entry in registered(kind)}).items()))


@cache
def _index() -> dict[str, Any]:
    """The generated index: for each kind its entries, and all modules that its rooms had when it was made."""
    try:
        found: dict[str, Any] = json.loads((Path(__file__).parent / INDEX).read_bytes())
    except FileNotFoundError:
        return {}
    return found


@cache
def _indexed(kind: str) -> dict[str, Entry[Any]]:
    there = set(modules(kind))  # a file that is gone since the index was made takes its methods with it
    return {
        line["name"]: Entry(kind, line["name"], line["module"], line["summary"], tuple(Paper(**paper) for paper in line["papers"]))
        for line in _index().get(kind, {}).get("entries", [])
        if line["module"] in there
    }


def modules(kind: str) -> list[str]:
    """The modules in the rooms of a kind, as files; nothing is imported."""
    top = Path(__file__).parent
    found = []
    for room in KINDS[kind].rooms:
        folder = top.joinpath(*room.split(".")[1:])
        for file in folder.rglob("*.py"):
            if file.stem != "__init__":
                found.append(".".join(("cairn", *file.relative_to(top).with_suffix("").parts)))
    return sorted(found)


def registers(module: str, kind: str) -> bool:
    """Whether a module registers something of a kind. Its text is searched: a room of several kinds is not imported for one of them."""
    text = Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text(encoding="utf-8")
    return re.search(rf"@register\(\s*[\"']{kind}[\"']", text) is not None


@cache
def _load_new(kind: str) -> None:
    """Import the modules of a kind's rooms that the index has not seen: methods that were written since it was made."""
    seen = set(_index().get(kind, {}).get("modules", []))
    for module in modules(kind):
        if module not in seen and registers(module, kind):
            importlib.import_module(module)


@cache
def _load_others() -> None:
    """Load what other packages register. One that fails is passed over, and named where its method is missed."""
    from importlib.metadata import entry_points

    for point in entry_points(group=ENTRY_POINTS):
        try:
            point.load()
        except Exception as error:  # whatever another package raises must not end a command that does not need it
            package = point.dist.name if point.dist is not None else point.name
            _failures[f"The package '{package}'"] = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")
