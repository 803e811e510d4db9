"""Folders of torch.distributed.checkpoint: chunks of tensors in .distcp files, described by one pickled .metadata."""

from __future__ import annotations

import functools
import itertools
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cairn.catalog import register
from cairn.checkpoint.foreign.layouts import WEIGHT, Layout, Opening, Slice, TensorSource, read_json
from cairn.checkpoint.foreign.pickles import Stored, plain, structure
from cairn.errors import DamagedError, InputError, MismatchError, NotFoundError

METADATA = ".metadata"


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and the part of a file that holds it."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    path: Path
    begin: int
    length: int

    def stored(self) -> Stored:
        """The tensor inside that part of the file."""
        found = structure(self.path, begin=self.begin, length=self.length)
        if not isinstance(found, Stored) or found.shape != self.shape:
            raise DamagedError(f"{self.path} does not hold the tensor that {METADATA} describes at byte {self.begin}; copy it again from its source.")
        return found


@register("layout", "dcp")
class DistributedCheckpoint(Layout):
    """A folder of torch.distributed.checkpoint, as FSDP2, DTensor and torchtitan save."""

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return (folder / METADATA).is_file()

    def open(self, opening: Opening) -> TensorSource:
        folder = opening.folder
        if not (folder / METADATA).is_file():
            raise NotFoundError(f"{folder} has no {METADATA}: the save was not finished.")
        opening.needs_pickles(folder / METADATA)
        metadata = plain(folder / METADATA, allowed=_classes())
        paths = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
        slices, left_out, facts = [], [], {}
        models = _models(paths.values())
        for name, entry in metadata.state_dict_metadata.items():
            place, top = _place(name, paths.get(name)), str((paths.get(name) or [name])[0])
            beside = place is not None and place[1] == WEIGHT and (top not in models if models else "." not in top)
            if place is None or not hasattr(entry, "chunks") or (models and beside):
                left_out.append(name)
            if beside and hasattr(entry, "chunks") and math.prod(entry.size) == 1:
                # A counter beside the weights, such as the step of the program that saved.
                chunks = list(_chunks(name, entry, metadata.storage_data or {}, folder))
                facts[name] = _read(name, tuple(entry.size), entry.properties.dtype, chunks).item()
                left_out += [] if name in left_out else [name]
            if name in left_out or place is None:
                continue
            chunks = list(_chunks(name, entry, metadata.storage_data or {}, folder))
            shape, dtype = tuple(entry.size), entry.properties.dtype
            slices.append(Slice(*place, shape, dtype, functools.partial(_read, name, shape, dtype, chunks)))
        ranks = len({path for path in folder.glob("*.distcp")})
        return TensorSource({"files": ranks}, slices, config=opening.config or read_json(folder / "config.json"), plain=facts, left_out=left_out)


def _models(paths: Iterable[Sequence[Any]]) -> set[str]:
    """The keys at the top of the saved state dictionary under which the model lies; empty where it lies at the top itself."""
    tops = {str(path[0]) for path in paths if len(path) > 1}
    return tops & {"model", "state_dict", "module", "app"}


def _place(name: str, path: Sequence[Any] | None) -> tuple[str, str] | None:
    """(parameter, key) of an entry, from its path in the saved state dict; None for what is neither weight nor moment."""
    parts = [str(part) for part in path] if path else [name]
    if "param_groups" in parts:
        return None
    if "state" in parts[:-2]:
        owner = parts[parts.index("state") + 1 :]
        return (owner[0], owner[1]) if len(owner) == 2 else None
    return parts[-1], WEIGHT


def _chunks(name: str, entry: Any, storage: Mapping[Any, Any], folder: Path) -> Iterator[Chunk]:
    """The chunks of a tensor. Raises where one is missing, lies outside, or where they do not cover the tensor once."""
    chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
    places = {tuple(index.offset or (0,) * len(entry.size)): info for index, info in storage.items() if index.fqn == name}
    _refuse_gaps(name, tuple(entry.size), chunks)
    for offset, shape in chunks:
        info = places.get(offset)
        if info is None:
            raise NotFoundError(f"{folder}: no file holds the part of '{name}' that begins at {offset}.")
        if getattr(info, "transform_descriptors", None):
            raise InputError(f"{folder}: '{name}' is compressed by an extension ({info.transform_descriptors[0]}), which is not read here.")
        path = folder / info.relative_path
        if Path(info.relative_path).name != info.relative_path:
            raise DamagedError(f"{folder / METADATA} names a file outside its own directory.")
        if not path.is_file():
            raise NotFoundError(f"{folder}: {info.relative_path} is missing.")
        yield Chunk(offset, shape, path, int(info.offset), int(info.length))


def _refuse_gaps(name: str, size: tuple[int, ...], chunks: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    covered = sum(math.prod(shape) for _, shape in chunks)
    apart = all(
        any(a[0][axis] + a[1][axis] <= b[0][axis] or b[0][axis] + b[1][axis] <= a[0][axis] for axis in range(len(size)))
        for a, b in itertools.combinations([chunk for chunk in chunks if math.prod(chunk[1])], 2)
    )
    if covered != math.prod(size) or not apart:
        raise MismatchError(f"The parts of '{name}' cover {covered} of its {math.prod(size)} items or overlap; the files are of different saves.")


def _read(name: str, shape: tuple[int, ...], dtype: torch.dtype, chunks: Sequence[Chunk]) -> torch.Tensor:
    if len(chunks) == 1:
        return chunks[0].stored().read()
    out = torch.empty(shape, dtype=dtype)
    for chunk in chunks:
        out[tuple(slice(begin, begin + size) for begin, size in zip(chunk.offset, chunk.shape, strict=True))] = chunk.stored().read()
    return out


def _path_text(*parts: str) -> str:
    """Stands for a path object in the metadata."""
    return "/".join(parts)


def _classes() -> list[Any]:
    """What .metadata is made of: plain records of torch's own, and a path."""
    from torch.distributed.checkpoint import filesystem, metadata

    names = ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex", "StorageMeta")
    records: list[Any] = [getattr(metadata, name) for name in names]
    return [
        *records,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        (_path_text, f"{pathlib.PosixPath.__module__}.PosixPath"),
        (_path_text, "pathlib.PosixPath"),
        (_path_text, "pathlib._local.PosixPath"),
    ]
