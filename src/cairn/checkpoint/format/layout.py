"""Where every byte of a safetensors file goes, known before any byte is copied.

A header is computed from names, dtypes and shapes alone. A process that holds a part of a tensor can therefore write it
straight into its final place with `pwrite`, in any order, from any number of threads or processes, and the file is a
valid safetensors file the moment the last byte has arrived. Torch is not needed here.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cairn.checkpoint.format import documents
from cairn.checkpoint.format.kinds import LARGEST_WHOLE
from cairn.checkpoint.format.place import is_store
from cairn.errors import DamagedError, InputError

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one item of each safetensors dtype."""

ALIGNMENT = 64
"""Tensor data begins at a multiple of this, so that mapped tensors suit vector instructions."""
LARGEST_HEADER = 100 * 2**20
MOST_DIMENSIONS = 64
"""As many as torch knows."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its values: `dtype` is a safetensors code such as 'BF16'."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class FileLayout:
    """One safetensors file: its header and, for each tensor, the byte range that it fills in the file."""

    filename: str
    header: bytes
    specs: tuple[TensorSpec, ...]
    ranges: Mapping[str, tuple[int, int]]
    size: int


def plan(specs: Iterable[TensorSpec], stem: str, shard_bytes: int | None = None) -> list[FileLayout]:
    """Lay tensors out in `stem.safetensors`, or in numbered files of at most `shard_bytes` of data each.

    The layout depends on the specs alone. A tensor larger than `shard_bytes` gets a file of its own.
    """
    ordered = list(specs)
    if len({spec.name for spec in ordered}) != len(ordered):
        raise InputError(f"two tensors of {stem} have the same name.")
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in ordered:
        if groups[-1] and shard_bytes is not None and filled + spec.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    if len(groups) == 1:
        return [_file(f"{stem}.safetensors", groups[0])]
    return [_file(f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups)]


def order(spec: TensorSpec) -> tuple[int, str]:
    """What the tensors of a file are sorted by. Widest items first keeps each aligned to its own item size without any gap, which the
    format forbids."""
    return -ITEM_BYTES[spec.dtype], spec.name


def _file(filename: str, specs: list[TensorSpec]) -> FileLayout:
    specs = sorted(specs, key=order)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, offset + spec.nbytes]}
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    begin = len(header)
    ranges = {spec.name: tuple(begin + o for o in entries[spec.name]["data_offsets"]) for spec in specs}
    return FileLayout(filename, header, tuple(specs), ranges, begin + offset)


def index(layouts: list[FileLayout]) -> dict[str, Any]:
    """The index document that transformers reads for a set of numbered files."""
    total = sum(spec.nbytes for layout in layouts for spec in layout.specs)
    return {"metadata": {"total_size": total}, "weight_map": {spec.name: layout.filename for layout in layouts for spec in layout.specs}}


def read_layout(path: Path) -> FileLayout:
    """The layout of an existing file, from its header alone. Raises `DamagedError` for anything that is not a sound one."""
    if is_store(path):
        size = path.stat().st_size
        with path.open("rb") as file:
            return _layout_in(path, file, size)
    with os.fdopen(documents.open_file(path), "rb") as file:
        return _layout_in(path, file, os.fstat(file.fileno()).st_size)


def _layout_in(path: Path, file: IO[bytes], size: int) -> FileLayout:
    start = file.read(8)
    if start == b"version ":
        raise DamagedError(f"{path} is the pointer of git-lfs, not the file itself: `git lfs pull` in its repository fetches it.")
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= LARGEST_HEADER:
        raise DamagedError(f"{path} is not a safetensors file: its header claims {length} bytes of a file of {size}.")
    if length > size - 8:
        raise DamagedError(f"{path} is cut short: its header alone has {length} bytes and the file {size}; fetch it again.")
    return parse_layout(path, start + file.read(length), size)


def parse_layout(path: Path, header: bytes, size: int) -> FileLayout:
    """The layout that a header describes of a file of `size` bytes; `path` is for errors and gives the name."""
    entries = documents.as_object(documents.parse(header[8:], f"{path}: the safetensors header"), f"{path}: the safetensors header")
    specs, ranges = [], {}
    for name, entry in entries.items():
        if name != "__metadata__":
            spec, span = _entry(path, name, entry, len(header))
            specs.append(spec)
            ranges[name] = span
    position = len(header)
    for name, (begin, end) in sorted(ranges.items(), key=lambda item: item[1]):
        if begin != position:
            raise DamagedError(f"{path}: the data of tensor '{name[:80]}' overlaps another's or leaves a gap.")
        position = end
    if position > size:
        raise DamagedError(f"{path} is cut short: it has {size} bytes and its header describes {position}; fetch it again.")
    if position != size:
        raise DamagedError(f"{path} has {size} bytes and its header describes {position}.")
    return FileLayout(path.name, header, tuple(specs), ranges, size)


def _entry(path: Path, name: str, entry: Any, begin: int) -> tuple[TensorSpec, tuple[int, int]]:
    unsound = DamagedError(f"{path}: the header's entry for tensor '{name[:80]}' is not sound.")
    if not isinstance(entry, dict):
        raise unsound
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(span, list) or len(span) != 2:
        raise unsound
    if dtype not in ITEM_BYTES:
        raise DamagedError(f"{path}: tensor '{name[:80]}' is of the type '{dtype[:20]}', which is not known; there is {', '.join(ITEM_BYTES)}.")
    if not all(type(n) is int and 0 <= n <= LARGEST_WHOLE for n in (*shape, *span)) or len(shape) > MOST_DIMENSIONS:
        raise unsound
    spec = TensorSpec(name, dtype, tuple(shape))
    if span[1] - span[0] != spec.nbytes:
        raise DamagedError(f"{path}: tensor '{name[:80]}' of shape {shape} in {dtype} has {spec.nbytes} bytes, and the header gives it {span[1] - span[0]}.")
    return spec, (begin + span[0], begin + span[1])
