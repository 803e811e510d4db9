"""A GGUF file as its metadata and its tensors, which are read and widened piece by piece.

The header is read here and not by the `gguf` package, because the file may come from anybody: every length is held against the bytes
that are left, so that a file that is cut short or lies is refused in one sentence, and 50,000 tokens take a tenth of a second.
What the codes of a quantization stand for is the package's business.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from cairn.checkpoint.format import documents
from cairn.errors import DamagedError, InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_DIMENSIONS = 4
PIECE_ITEMS = 2**17
"""Values that are widened at once: few enough to stay in the processor's cache."""
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
"""Types whose values stand in the file as they are."""

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Kinds of values in the metadata, as `struct` writes them; 8 is a string, 9 an array."""
_STRING, _ARRAY = 8, 9


def package() -> Any:
    """The `gguf` package. Raises `InputError` where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise InputError("GGUF files need the extra 'quant': pip install 'cairn-lm[quant]'.") from None
    return gguf


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: its name and type there, its shape in torch's order, and where its bytes lie."""

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int
    block: tuple[int, int]
    """Values and bytes of one block of its type."""

    @property
    def dtype(self) -> torch.dtype:
        """In which dtype its values are handed over: as they are stored, and float32 for what is quantized."""
        return PLAIN.get(self.kind, torch.float32)

    def read(self) -> torch.Tensor:
        """All values."""
        whole = torch.empty(math.prod(self.shape), dtype=self.dtype)
        begin = 0
        for piece in self.pieces():
            whole[begin : begin + len(piece)] = piece
            begin += len(piece)
        return whole.reshape(self.shape)

    def pieces(self) -> Iterator[torch.Tensor]:
        """The values in flat pieces, so that no more than one of them is in memory twice."""
        items, size = self.block
        step = max(1, PIECE_ITEMS // items) * size
        with os.fdopen(documents.open_file(self.path, named=True), "rb") as file:
            file.seek(self.begin)
            for begin in range(0, self.nbytes, step):
                data = file.read(min(step, self.nbytes - begin))
                if len(data) < min(step, self.nbytes - begin):
                    raise DamagedError(f"{self.path} is cut short: '{self.name}' ends beyond the end of the file.")
                yield self._widened(bytearray(data))

    def _widened(self, data: bytearray) -> torch.Tensor:
        if self.kind in PLAIN:
            return torch.frombuffer(data, dtype=PLAIN[self.kind])
        gguf = package()
        codes = np.frombuffer(data, np.uint8).reshape(1, -1)
        return torch.from_numpy(gguf.quants.dequantize(codes, gguf.GGMLQuantizationType[self.kind]).reshape(-1))


@dataclass(frozen=True)
class GGUFFile:
    """A file, opened: its metadata as plain values, its tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """Read the header. Raises `DamagedError` for a file that is cut short or no GGUF, `InputError` for a kind of file or quantization not known."""
        with os.fdopen(documents.open_file(path, named=True), "rb") as file:
            return _Header(path, file).read()

    def number(self, key: str, default: Any = None) -> Any:
        """A number of the metadata. Raises `InputError` where it is something else."""
        value = self.metadata.get(key, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)):
            raise InputError(
                f"{self.path}: the metadata '{key}' is {type(value).__name__}, and one number was expected; models with other sizes in each layer are not read."
            )
        return value

    def text(self, key: str) -> str | None:
        """A text of the metadata. Raises `DamagedError` where it is something else."""
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise DamagedError(f"{self.path}: the metadata '{key}' is no text.")
        return value


class _Header:
    """The header, from its first byte to its last; every length is held against what is left of the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.order = path, file, "<"
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0

    def read(self) -> GGUFFile:
        if self._bytes(4) != MAGIC:
            raise DamagedError(f"{self.path} is no GGUF file: it does not begin with 'GGUF'.")
        version = self._number("I")
        if version not in VERSIONS:
            other = " of the other byte order" if version % 65536 == 0 else ""
            raise InputError(f"{self.path} is a GGUF file{other} of version {version}; versions {' and '.join(map(str, VERSIONS))} are read. Convert it anew.")
        count, keys = self._number("Q"), self._number("Q")
        self._refuse_more(keys, 13, "keys")
        metadata = {}
        for _ in range(keys):
            key = self._text()
            metadata[key] = self._value(self._number("I"), key)
        self._refuse_more(count, 24, "tensors")
        described = [self._tensor() for _ in range(count)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment % 8:
            raise DamagedError(f"{self.path}: the alignment is {alignment!r}, which is no multiple of 8.")
        first = -(-self.at // alignment) * alignment
        return GGUFFile(self.path, metadata, self._placed(described, first))

    def _placed(self, described: list[tuple[str, int, tuple[int, ...], int]], first: int) -> dict[str, StoredTensor]:
        sizes, types = package().GGML_QUANT_SIZES, package().GGMLQuantizationType
        readable = {kind.value for kind in package().quants._type_traits} | {types[name].value for name in PLAIN}
        tensors: dict[str, StoredTensor] = {}
        for name, number, shape, offset in described:
            if number not in readable:
                called = types(number).name if number in types._value2member_map_ else f"number {number}"
                raise InputError(
                    f"{self.path}: '{name}' is stored as {called}, a quantization that is not known here; ask for a file in another one (Q8_0, Q4_K ...)."
                )
            kind = types(number)
            items, size = sizes[kind]
            if shape[-1] % items:
                raise DamagedError(f"{self.path}: the rows of '{name}' have {shape[-1]} values, which is no multiple of the {items} of a {kind.name} block.")
            nbytes = math.prod(shape) // items * size
            if first + offset + nbytes > self.size:
                raise DamagedError(f"{self.path} is cut short: '{name}' ends at byte {first + offset + nbytes}, and the file has {self.size}. Fetch it again.")
            if name in tensors:
                raise DamagedError(f"{self.path}: '{name}' is there twice.")
            tensors[name] = StoredTensor(self.path, name, kind.name, shape, first + offset, nbytes, (items, size))
        return tensors

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        """Name, type, shape in torch's order, offset."""
        name = self._text()
        dimensions = self._number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise DamagedError(f"{self.path}: '{name[:80]}' has {dimensions} dimensions.")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        if not all(shape) or math.prod(shape) > 2**53:
            raise DamagedError(f"{self.path}: '{name[:80]}' is of the shape {shape}, which no tensor has.")
        return name, self._number("I"), shape, self._number("Q")

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._number(self._code(kind, key))
        inner, count = self._number("I"), self._number("Q")
        if inner == _STRING:
            self._refuse_more(count, 8, f"texts in '{key[:80]}'")
            return [self._text() for _ in range(count)]
        code = self._code(inner, key)  # arrays of arrays are of no use to anybody
        self._refuse_more(count, struct.calcsize(code), f"numbers in '{key[:80]}'")
        return list(struct.unpack(f"{self.order}{count}{code}", self._bytes(count * struct.calcsize(code))))

    def _code(self, kind: int, key: str) -> str:
        if kind not in _NUMBERS:
            raise DamagedError(f"{self.path}: the metadata '{key[:80]}' is of a kind that is not known ({kind}).")
        return _NUMBERS[kind]

    def _text(self) -> str:
        data = self._bytes(self._number("Q"))
        try:
            return data.decode()
        except UnicodeDecodeError:
            # A vocabulary of bytes may hold halves of characters; they are of use to nobody, and the token keeps its place.
            return data.decode(errors="replace")

    def _number(self, code: str) -> Any:
        return struct.unpack(f"{self.order}{code}", self._bytes(struct.calcsize(code)))[0]

    def _bytes(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise DamagedError(f"{self.path} is cut short: its header goes on beyond the end of the file. Fetch it again.")
        data = self.file.read(count)
        if len(data) < count:
            raise DamagedError(f"{self.path} is cut short: its header ends early. Fetch it again.")
        self.at += count
        return data

    def _refuse_more(self, count: int, least: int, what: str) -> None:
        """Raise `DamagedError` where the header announces more than the rest of the file has room for."""
        if count * least > self.size - self.at:
            raise DamagedError(f"{self.path} is cut short or no GGUF file: it announces {count} {what}, and {self.size - self.at} bytes are left.")
