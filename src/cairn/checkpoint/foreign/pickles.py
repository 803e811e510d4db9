"""Pickled files of other programs, read by torch's restricted unpickler alone: no code of theirs runs, no code of theirs is needed.

`structure` loads what a file says without any tensor's bytes: each tensor comes back as a `Stored`, which knows where in the
file its bytes lie and reads them when asked. Memory is therefore bounded by the tensors in use, not by the file.
"""

from __future__ import annotations

import io
import itertools
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cairn.errors import DamagedError, InputError


class Inert:
    """Stands for an object of another program: keeps what it was made from and does nothing."""

    arguments: Any = ()
    state: Any = None  # an object may be made without __init__

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.arguments, self.state = arguments, named

    def __setstate__(self, state: Any) -> None:
        # Objects with slots are pickled as two mappings, of which the first may be None.
        slotted = isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict)
        self.state = {**(state[0] or {}), **state[1]} if slotted else state

    def __getitem__(self, key: str) -> Any:
        return self.state[key]


class InertTensor(torch.Tensor):
    """Stands for a tensor of a class that keeps its values in other tensors: `inert` is what it was made from."""

    inert: Any = None

    def __setstate__(self, state: Any) -> None:
        self.inert = state

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError("a tensor that stands for another has no values")


class InertInt(int):
    """Stands for a member of an enumeration of whole numbers."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: where its bytes lie. `read` brings it, or a stretch of it in C order, into memory."""

    path: Path
    position: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def read(self) -> torch.Tensor:
        """The whole tensor."""
        if not self.numel:
            return torch.empty(self.shape, dtype=self.dtype)
        items = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return torch.as_strided(self._items(0, items), self.shape, self.stride).contiguous()

    def flat(self, begin: int, end: int) -> torch.Tensor:
        """Items `begin` to `end` of a tensor that lies in C order (a flattened buffer does)."""
        return self._items(begin, end)

    def _items(self, begin: int, end: int) -> torch.Tensor:
        out = torch.empty(end - begin, dtype=self.dtype)
        target = memoryview(out.view(torch.uint8).numpy().data)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.position + begin * self.dtype.itemsize)
            done = 0
            while done < len(target):
                count = file.readinto(target[done:])
                if not count:
                    raise DamagedError(f"{self.path} ends in the middle of a tensor; copy it again from its source.")
                done += count
        return out


def structure(path: Path, *, allowed: Iterable[tuple[Any, str]] = (), begin: int = 0, length: int | None = None) -> Any:
    """What a file written by `torch.save` holds, with a `Stored` for each tensor; of a larger file, the part from `begin`.

    `allowed` are stand-ins for classes that the layout is known to hold, by their full names. Raises `InputError` for any
    other class and for the format from before torch 1.6, `DamagedError` for a file that cannot be read.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with path.open("rb") as file:
        window = _Window(file, begin, length if length is not None else path.stat().st_size - begin)
        if not zipfile.is_zipfile(window):
            raise InputError(f"{path} is not in the format that torch writes since 1.6; load it in torch and save it again, as safetensors if you can.")
        window.seek(0)
        # Tensors that are fake have a shape and the position of their bytes, which is all that is wanted of them here.
        with torch.serialization.safe_globals(list(allowed)), FakeTensorMode():
            loaded = _restricted(path, window)
    return _located(loaded, path, begin)


def plain(path: Path, *, allowed: Iterable[Any] = ()) -> Any:
    """What a file written by `pickle.dump` holds, read by the same restricted unpickler."""
    # torch.load takes an archive with a pickle of protocol 2; the file is rewritten as one in memory.
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", _checked_protocol_2(path))
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/version", "3\n")
    archive.seek(0)
    with torch.serialization.safe_globals(list(allowed)):
        return _restricted(path, archive)


def _checked_protocol_2(path: Path) -> bytes:
    try:
        return _protocol_2(path.read_bytes())
    except (ValueError, IndexError) as error:
        raise DamagedError(f"{path} is not a whole pickle ({str(error).splitlines()[0]}); copy it again from its source.") from None


def _protocol_2(raw: bytes) -> bytes:
    """A pickle of protocol 4 in the words of protocol 2, which is all that torch's restricted unpickler knows. Nothing is unpickled.

    Texts are written out wherever they are used, so that only other objects are remembered; a class, which protocol 4
    names by the two texts before it, is named in one word.
    """
    out, texts, memo, fresh = bytearray(), list[tuple[int, str]](), list[str | None](), False
    operations = list(pickletools.genops(raw))
    ends = [position for _, _, position in operations[1:]]
    for (operation, argument, position), end in zip(operations, [*ends, None], strict=True):
        word = operation.name
        if word == "MEMOIZE":
            text = texts[-1][1] if texts and fresh else None
            memo.append(text)
            out += b"" if text is not None else b"r" + struct.pack("<I", len(memo) - 1)
        elif word == "STACK_GLOBAL":
            (start, module), (_, name) = texts[-2:]
            del out[start:], texts[-2:]
            out += f"c{module}\n{name}\n".encode()
        elif (word in ("BINGET", "LONG_BINGET") and isinstance(memo[int(argument or 0)], str)) or word.endswith("BINUNICODE"):
            text = str(argument if word.endswith("BINUNICODE") else memo[int(argument or 0)])
            texts.append((len(out), text))
            out += b"X" + struct.pack("<I", len(text.encode())) + text.encode()
        elif word not in ("FRAME", "PROTO"):
            out += raw[position:end]
        fresh = word.endswith("BINUNICODE")
    return b"\x80\x02" + bytes(out)


def _restricted(path: Path, file: Any) -> Any:
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        unsafe = _named_class(str(error))
        what = f"an object of the class {unsafe}" if unsafe else "something other than tensors and plain values"
        raise InputError(f"{path} holds {what}, and reading that could run code; save the tensors alone with the program that wrote it.") from None
    except (RuntimeError, ValueError, KeyError, EOFError, AttributeError, TypeError) as error:
        raise DamagedError(f"{path} cannot be read as a file of torch ({str(error).splitlines()[0]}); copy it again from its source.") from None


def _named_class(message: str) -> str | None:
    words = message.replace("`", " ").split()
    return next((after for word, after in itertools.pairwise(words) if word == "GLOBAL"), None)


def _located(value: Any, path: Path, begin: int) -> Any:
    if isinstance(value, InertTensor):
        value.inert = _located(value.inert, path, begin)
        return value
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided:
            raise InputError(f"{path} holds a sparse tensor, which has no place in a checkpoint here.")
        start = value.untyped_storage()._checkpoint_offset or 0
        position = begin + start + int(value.storage_offset()) * value.dtype.itemsize
        return Stored(path, position, value.dtype, tuple(value.shape), tuple(value.stride()))
    if isinstance(value, torch.Size):
        return tuple(value)
    if isinstance(value, Inert):
        value.arguments, value.state = _located(value.arguments, path, begin), _located(value.state, path, begin)
        return value
    if isinstance(value, Mapping):
        return {key: _located(item, path, begin) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_located(item, path, begin) for item in value]
    return value


def tensors_of(loaded: Any, path: Path) -> list[tuple[str, Stored]]:
    """The named tensors of a pickled state dict. Raises `DamagedError` where it is none."""
    if not isinstance(loaded, dict) or not loaded:
        raise DamagedError(f"{path} holds no tensors by name.")
    strange = next((str(name) for name, value in loaded.items() if not isinstance(value, Stored)), None)
    if strange is not None:
        raise DamagedError(f"{path}: '{strange}' is not a tensor, so this is not a file of weights.")
    return [(str(name), value) for name, value in loaded.items()]


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: Any, begin: int, length: int) -> None:
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, target: Any) -> int:
        self._file.seek(self._begin + self._at)
        data = self._file.read(max(0, min(len(target), self._length - self._at)))
        target[: len(data)] = data
        self._at += len(data)
        return len(data)
