"""Tensors that are read only when, and only as far as, they are asked for: from a file, an object of a store, or fragments."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cairn import native
from cairn.checkpoint.format import documents
from cairn.checkpoint.format.fragments import StoredFile
from cairn.checkpoint.format.layout import TensorSpec
from cairn.checkpoint.format.parts import Part, in_short_rows, spans
from cairn.checkpoint.format.place import file_system, key
from cairn.checkpoint.format.sound import SoundBlocks
from cairn.errors import DamagedError

if TYPE_CHECKING:
    import torch

CHUNK = 8 * 2**20
"""Bytes that are read at a time."""


FEWEST_BYTES = 2**18
"""Columns of fewer bytes are copied by torch: a kernel would be compiled for nothing."""


def _rows_library() -> ctypes.CDLL | None:
    return native.library(Path(__file__).with_name("rows.c"))


class File(Protocol):
    """What bytes are read from, by their position."""

    def read_into(self, target: memoryview, position: int, *, verified: bool = False) -> None:
        """Fill `target` with the bytes from `position` on. Raises `DamagedError` if the file ends before, or, where `verified` is asked and
        digests are known, if the bytes are not what was written."""

    def view(self, begin: int, count: int) -> Any:
        """These bytes as a buffer that can be written to without changing the file."""


class LazyTensor:
    """A stored tensor: `shape`, `dtype`, `load()` for all of it, `lazy[rows, columns]` for a part."""

    def __init__(self, spec: TensorSpec, file: File, begin: int) -> None:
        self.spec, self._file, self._begin = spec, file, begin

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    @property
    def dtype(self) -> torch.dtype:
        from cairn.checkpoint.format.dtypes import DTYPES

        return DTYPES[self.spec.dtype]

    def view(self) -> torch.Tensor:
        """The tensor as a private mapping of the file: pages are read when touched. It must not be changed in place.

        What lies in a store is read whole.
        """
        import torch

        if not self.nbytes:
            return self.empty()
        return torch.frombuffer(self._file.view(self._begin, self.nbytes), dtype=torch.uint8).view(self.dtype).view(self.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """A copy of a part; only the pages of that part are read."""
        return self.view()[index].clone()

    def flat(self, begin: int, end: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Items `begin` to `end` of the tensor in C order; the end may lie beyond the tensor's.

        They are read into the first items of `out`, a flat tensor of this dtype, or into new memory.
        """
        import torch

        size = self.dtype.itemsize
        begin, end = min(begin * size, self.nbytes), min(end * size, self.nbytes)
        count = (end - begin) // size
        out = torch.empty(count, dtype=self.dtype) if out is None else out[:count]
        self._read_range(_bytes_of(out), begin)
        return out

    def empty(self) -> torch.Tensor:
        import torch

        return torch.empty(self.shape, dtype=self.dtype)

    def load(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The whole tensor in memory; `out`, if given, is a contiguous host tensor of this dtype and shape that takes it."""
        out = self.empty() if out is None else out
        for begin in self.piece_starts():
            self.read_piece(out, begin)
        return out

    def piece_starts(self) -> list[int]:
        """Where the pieces begin in which it is read, in bytes: at multiples of their size in the file, so that most blocks are read whole."""
        first = CHUNK - self._begin % CHUNK
        return [0, *range(first, self.nbytes, CHUNK)] if self.nbytes else []

    def read_part(self, part: Part, out: torch.Tensor | None = None) -> torch.Tensor:
        """A part of the tensor, reading no other bytes; `out`, if given, is a contiguous host tensor of its shape and this dtype."""
        import torch

        out = torch.empty(part.shape, dtype=self.dtype) if out is None else out
        size, target = self.dtype.itemsize, _bytes_of(out)
        whole = part.count == math.prod(self.shape)
        if in_short_rows(self.shape, part, size) and not whole:
            if not self._copy_rows(part, out):
                out.copy_(self.view()[part.slices])
            return out
        for span in spans(self.shape, part):
            for begin in range(0, span.items * size, CHUNK):
                end = min(begin + CHUNK, span.items * size)
                self._read_range(target[span.inner * size + begin : span.inner * size + end], span.outer * size + begin, verified=whole)
        return out

    def _copy_rows(self, part: Part, out: torch.Tensor) -> bool:
        """Columns of a mapped matrix by our kernel, where it is there and pays."""
        library = _rows_library() if part.count * self.dtype.itemsize >= FEWEST_BYTES else None
        if library is None or not isinstance(self._file, MappedFile):
            return False
        source, size = self.view(), self.dtype.itemsize
        begin = (part.offset[0] * self.shape[1] + part.offset[1]) * size
        numbers = self.shape[1] * size, out.data_ptr(), part.shape[0], part.shape[1] * size
        distance, to, rows, width = (ctypes.c_int64(number) for number in numbers)
        library.cairn_copy_rows(ctypes.c_int64(source.data_ptr() + begin), distance, to, rows, width)
        return True

    def read_bytes(self, target: memoryview, offset: int) -> None:
        """Fill `target` with bytes of the tensor from `offset` on, as they are stored."""
        self._read_range(target, offset)

    def read_piece(self, out: torch.Tensor, begin: int) -> None:
        """Read the piece that begins `begin` bytes into the tensor (`piece_starts`) to the same place of `out`."""
        end = begin + CHUNK - (self._begin + begin) % CHUNK
        self._read_range(_bytes_of(out)[begin:end], begin)

    def _read_range(self, target: memoryview, offset: int, *, verified: bool = True) -> None:
        self._file.read_into(target, self._begin + offset, verified=verified)


class StoredTensor(LazyTensor):
    """A tensor whose boxes lie in the fragments of a store."""

    def __init__(self, spec: TensorSpec, stored: StoredFile, sound: SoundBlocks | None = None) -> None:
        self.spec, self._stored, self._sound = spec, stored, sound
        self._begin = stored.layout.ranges[spec.name][0]

    def view(self) -> torch.Tensor:
        """The tensor, read whole: a store cannot be mapped."""
        return self.load()

    def __getitem__(self, index: Any) -> torch.Tensor:
        """A copy of a part; of slices and numbers only the boxes that they meet are read, of other indices all of them."""
        found = _box(self.name, self.shape, index)
        return self.view()[index].clone() if found is None else self.read_part(found[0]).reshape(found[1])

    def read_part(self, part: Part, out: torch.Tensor | None = None) -> torch.Tensor:
        """A part of the tensor, fetching no other bytes but small gaps."""
        import torch

        out = torch.empty(part.shape, dtype=self.dtype) if out is None else out
        self._stored.read_part(part, _bytes_of(out))
        return out

    def _read_range(self, target: memoryview, offset: int, *, verified: bool = True) -> None:
        self._stored.read_range(self.name, offset, target)
        if verified and self._sound is not None:
            self._sound.check(target, self._begin + offset)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous host tensor."""
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _box(name: str, whole: tuple[int, ...], index: Any) -> tuple[Part, tuple[int, ...]] | None:
    """The box that slices and numbers pick, and the shape of the result; None for any other index."""
    index = index if isinstance(index, tuple) else (index,)
    if len(index) > len(whole) or not all(type(i) is int or (isinstance(i, slice) and i.step in (None, 1)) for i in index):
        return None
    offset, shape, kept = [], [], []
    for size, item in zip(whole, (*index, *(slice(None) for _ in whole[len(index) :])), strict=True):
        if type(item) is int:
            if not -size <= item < size:
                raise IndexError(f"index {item} is out of range for {size} items of '{name}'")
            begin, end = item % size, item % size + 1
        else:
            begin, end, _ = item.indices(size)
            kept.append(max(0, end - begin))
        offset.append(begin)
        shape.append(max(0, end - begin))
    return Part(name, tuple(offset), tuple(shape)), tuple(kept)


class MappedFile:
    """One file, opened and mapped when first needed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sound: SoundBlocks | None = None

    def verify_by(self, digests: Sequence[str], block_size: int, size: int) -> None:
        """Hold what is read against these digests of its blocks."""
        self._sound = SoundBlocks(self.path, digests, block_size, size, self._fill)

    @functools.cached_property
    def _fd(self) -> _Descriptor:
        return _Descriptor(self.path)

    @functools.cached_property
    def _map(self) -> mmap.mmap:
        # A private mapping is writable in memory only: torch gets a buffer without a warning, the file cannot change.
        return mmap.mmap(self._fd.number, 0, access=mmap.ACCESS_COPY)

    def view(self, begin: int, count: int) -> Any:
        return memoryview(self._map)[begin : begin + count]

    def read_into(self, target: memoryview, position: int, *, verified: bool = False) -> None:
        self._fill(target, position)
        if verified and self._sound is not None:
            self._sound.check(target, position)

    def _fill(self, target: memoryview, position: int) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self._fd.number, [target[done:]], position + done)
            if count == 0:
                raise DamagedError(f"{self.path} ends before byte {position + len(target)}.")
            done += count


class StoreObject:
    """One object of a store, read by byte ranges."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sound: SoundBlocks | None = None

    def verify_by(self, digests: Sequence[str], block_size: int, size: int) -> None:
        """Hold what is read against these digests of its blocks."""
        self._sound = SoundBlocks(self.path, digests, block_size, size, self._fill)

    def view(self, begin: int, count: int) -> Any:
        found = bytearray(count)
        self.read_into(memoryview(found), begin)
        return found

    def read_into(self, target: memoryview, position: int, *, verified: bool = False) -> None:
        self._fill(target, position)
        if verified and self._sound is not None:
            self._sound.check(target, position)

    def _fill(self, target: memoryview, position: int) -> None:
        data = file_system(self.path).cat_file(key(self.path), start=position, end=position + len(target)) if len(target) else b""
        if len(data) != len(target):
            raise DamagedError(f"{self.path} ends before byte {position + len(target)}.")
        target[:] = data


class _Descriptor:
    """A file descriptor that is closed with its last user."""

    def __init__(self, path: Path) -> None:
        self.number = documents.open_file(path)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.number)
