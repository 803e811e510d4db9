"""What a walk through a model's blocks keeps on disk: finished blocks, and the hidden states between two blocks.

The folder belongs to one walk, named by a key; a folder with another key is emptied. Files appear whole, by a rename, and in an order
that leaves a walk that was killed at any moment something to go on from: first the states that enter the next block, then the block.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cairn.checkpoint.format.layout import read_layout
from cairn.checkpoint.format.lazy import LazyTensor, MappedFile
from cairn.errors import InputError

KEY, LOCK = "key", "lock"


class Work:
    """The folder of a walk.

    Parameters
    ----------
    folder
        Made if it is not there.
    key
        What the walk depends on. What another walk left in the folder is removed.

    Raises
    ------
    InputError
        If another process works in the folder.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise InputError(f"Another process is working in {folder}; wait for it, or choose another place for the result.") from None
        if not (folder / KEY).is_file() or (folder / KEY).read_text() != key:
            for path in folder.iterdir():
                if path.name != LOCK:
                    path.unlink()
            self._show(KEY, key.encode())
        self.tensors: dict[str, LazyTensor] = {}
        for number in range(self.finished()):
            self._open(number)

    def finished(self) -> int:
        """How many blocks are finished."""
        number = 0
        while self._block(number).is_file():
            number += 1
        return number

    def has_states(self, block: int) -> bool:
        """Whether the states that enter a block lie here."""
        return self.states_of(block).is_file()

    def states_of(self, block: int) -> Path:
        """Where the states that enter a block lie."""
        return self.folder / f"states-{block:05d}"

    def kept(self, block: int) -> dict[str, Tensor]:
        """What was kept of a finished block."""
        return {name: tensor.load() for name, tensor in self._open(block).items()}

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Finish the next block with these tensors."""
        from safetensors.torch import save

        number = self.finished()
        self._show(self._block(number).name, save({name: values.contiguous().cpu() for name, values in tensors.items()}))
        self._open(number)
        self.states_of(number).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder and what is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let others work in the folder."""
        os.close(self._lock)

    def _open(self, number: int) -> dict[str, LazyTensor]:
        path = self._block(number)
        layout = read_layout(path)
        file = MappedFile(path)
        found = {spec.name: LazyTensor(spec, file, layout.ranges[spec.name][0]) for spec in layout.specs}
        self.tensors |= found
        return found

    def _block(self, number: int) -> Path:
        return self.folder / f"block-{number:05d}.safetensors"

    def _show(self, name: str, data: bytes) -> None:
        part = self.folder / f"{name}.part"
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.folder / name)


class States:
    """The hidden states of all texts between two blocks, in memory where they fit, else in files of the work folder.

    `write` says what leaves a block, `turn` makes that what enters the next.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, memory: int, work: Work, block: int = 0) -> None:
        self.shape, self.dtype, self.work, self.block = shape, dtype, work, block
        self._row = math.prod(shape[1:])
        size = math.prod(shape) * dtype.itemsize
        self._held = torch.empty(shape, dtype=dtype) if size <= memory and not work.has_states(block) else None

    def batches(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        """What enters the present block, `rows` texts at a time, with the number of the first."""
        for begin in range(0, self.shape[0], rows):
            yield begin, self._read(begin, min(begin + rows, self.shape[0]))

    def write(self, begin: int, values: Tensor) -> None:
        """What leaves the block of the texts from number `begin` on."""
        if self._held is not None:
            self._held[begin : begin + len(values)] = values
            return
        flat = values.to(self.dtype).contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        with self._part().open("r+b" if self._part().exists() else "wb") as file:
            file.seek(begin * self._row * self.dtype.itemsize)
            file.write(flat.data)

    def begin(self) -> None:
        """What was written enters the first block."""
        self.block -= 1
        self.turn()

    def turn(self) -> None:
        """What was written enters the next block."""
        self.block += 1
        if self._held is None:
            with self._part().open("r+b") as file:
                os.fsync(file.fileno())
            os.replace(self._part(), self.work.states_of(self.block))

    def _part(self) -> Path:
        return self.work.folder / "states.part"

    def _read(self, begin: int, end: int) -> Tensor:
        if self._held is not None:
            return self._held[begin:end]
        item = self.dtype.itemsize
        with self.work.states_of(self.block).open("rb") as file:
            file.seek(begin * self._row * item)
            data = bytearray(file.read((end - begin) * self._row * item))
        return torch.frombuffer(data, dtype=self.dtype).view(end - begin, *self.shape[1:])
