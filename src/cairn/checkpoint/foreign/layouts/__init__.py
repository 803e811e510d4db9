"""Layouts of other programs: a folder as a list of lazy slices on a grid of ranks, one file per layout.

A layout undoes what it alone knows (how data-parallel ranks cut flattened buffers, which file belongs to which rank) and
hands over slices; completeness, joining, naming, refusing and publishing are the importer's (`checkpoint/importing.py`).
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from cairn.checkpoint.foreign.pickles import Stored
from cairn.checkpoint.foreign.spec import ShardSpec
from cairn.checkpoint.format import documents
from cairn.errors import InputError, MismatchError, NotFoundError
from cairn.options import Options

WEIGHT = ""
"""The key of a parameter's value itself, beside 'exp_avg', 'exp_avg_sq', 'step' and what else an optimizer keeps."""

Translate = Callable[[str, torch.Tensor], Iterator[tuple[str, torch.Tensor]]]
"""From a parameter as it is called and shaped there to the parameters here; a pure function that also works on meta tensors."""


@dataclass(frozen=True)
class Slice:
    """What one cell of the grid of ranks holds of one tensor; `load` brings its values."""

    name: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]
    stage: int = 0
    """Pipeline stage."""
    tensor: int = 0
    """Tensor-parallel rank."""
    expert: int = 0
    """Expert-parallel rank."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The slice in memory."""
        return self.load()

    def meta(self) -> torch.Tensor:
        """The slice without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def whole(name: str, stored: Stored, *, stage: int = 0, tensor: int = 0, expert: int = 0) -> Slice:
    """A slice that is one stored tensor, a parameter's value."""
    return Slice(name, WEIGHT, stored.shape, stored.dtype, stored.read, stage, tensor, expert)


def unchanged(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The translation of layouts that already bear Hugging Face names."""
    yield name, tensor


@dataclass(frozen=True)
class TensorSource:
    """A foreign checkpoint, opened: `grid` counts ranks by axis, `recorded` is what its files say about how tensors were cut."""

    grid: dict[str, int]
    slices: list[Slice]
    recorded: ShardSpec = field(default_factory=lambda: ShardSpec(strict=False))
    translate: Translate = unchanged
    aliases: dict[str, str] = field(default_factory=dict)
    """Tied tensors: an alias and the name under which the values are stored."""
    config: dict[str, Any] | None = None
    plain: dict[str, Any] = field(default_factory=dict)
    """Small facts such as the step, for lineage."""
    left_out: list[str] = field(default_factory=list)
    """What is there and does not come over, one plain line each."""
    documents: dict[str, bytes] = field(default_factory=dict)
    """Small files that the layout makes of what it knows: the tokenizer of a file that holds one as metadata."""
    file: Path | None = None
    """The one file that everything lies in; its digest goes into lineage."""


@dataclass(frozen=True)
class Opening:
    """What a layout is opened with."""

    folder: Path
    pickles: bool = False
    """Whether pickled files may be read (by the restricted unpickler)."""
    config: dict[str, Any] | None = None
    """config.json, where the user gave one."""
    own_tokenizer: bool = False
    """Whether the user named a folder with the tokenizer's files."""

    def needs_pickles(self, path: Path) -> None:
        """Raise `InputError` unless the user asked for pickled files to be read."""
        if not self.pickles:
            raise InputError(f"{path} is a pickle; --pickle reads it, with torch's restricted reader, which runs no code from it.")


class Layout(Options, ABC):
    """Base of all layouts."""

    catalog_kind: ClassVar[str] = "layout"

    pickled: ClassVar[bool] = True
    """Whether its files are pickles, which are read on request only."""
    single_file: ClassVar[bool] = False
    """Whether one file may be named instead of a folder."""

    @classmethod
    @abstractmethod
    def recognises(cls, folder: Path) -> bool:
        """Whether the names of the files in a folder, or the name of a file, say that it is of this layout."""

    @abstractmethod
    def open(self, opening: Opening) -> TensorSource:
        """Headers and structure of everything, values of nothing. Raises `CairnError` where files are missing or contradict each other."""


Cell = TypeVar("Cell", bound=tuple[int, ...])


def by_rank(files: Iterable[tuple[Cell, Path]], axes: tuple[str, ...], where: Path) -> dict[Cell, Path]:
    """The files by their cells of the grid. Raises `MismatchError` for a cell that is there twice."""
    found: dict[Cell, Path] = {}
    for cell, path in files:
        if cell in found:
            raise MismatchError(f"{where} holds two files for {_cell(cell, axes)}, {found[cell].name} and {path.name}; they are of different saves.")
        found[cell] = path
    return found


def complete(found: Collection[tuple[int, ...]], sizes: tuple[int, ...], axes: tuple[str, ...], where: Path) -> None:
    """Raise `NotFoundError` unless every cell of the grid is there."""
    missing = next((cell for cell in itertools.product(*(range(size) for size in sizes)) if cell not in found), None)
    if missing is not None:
        raise NotFoundError(f"{where} is not complete: the file of {_cell(missing, axes)} is missing ({len(found)} of {math.prod(sizes)} are there).")


def agreed(values: Iterable[Any], what: str, where: Path) -> Any:
    """The one value that all ranks say. Raises `MismatchError` where they say different ones."""
    seen: list[Any] = []
    for value in values:
        if value not in seen:
            seen.append(value)
    if len(seen) > 1:
        raise MismatchError(f"The ranks of {where} disagree about the {what}: {seen[0]} and {seen[1]}; their files are of different saves.")
    return seen[0] if seen else None


def read_json(path: Path, *, named: bool = False) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file; `named`: the user named this very file."""
    try:
        return documents.read_object(path, named=named)
    except FileNotFoundError:
        return None


def _cell(cell: tuple[int, ...], axes: tuple[str, ...]) -> str:
    return ", ".join(f"{axis} rank {rank}" for axis, rank in zip(axes, cell, strict=True))
