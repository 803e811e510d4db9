"""Reading a state out of the keepers' memory: from where it lies, else out of parity, else not at all."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cairn.checkpoint.format import documents
from cairn.checkpoint.format.folder import TensorFolder
from cairn.checkpoint.format.layout import ITEM_BYTES, TensorSpec
from cairn.checkpoint.format.lazy import LazyTensor
from cairn.checkpoint.format.manifest import BLOCK_BYTES
from cairn.checkpoint.format.parts import Part, spans
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.memory.area import DIGEST, Area, block_digest, table_bytes
from cairn.checkpoint.memory.link import GoneError, Home, Link, homes, node
from cairn.checkpoint.memory.plan import ParityLayout, Share
from cairn.errors import DamagedError

if TYPE_CHECKING:
    import torch

CACHED = 16
"""Blocks that were fetched or computed and are kept for the next read."""


@dataclass
class MemoryReader:
    """A planned version, read block by block; every block is compared with its digest before it is used."""

    plan: ParityLayout
    _homes: dict[str, Home] = field(default_factory=dict)
    _links: dict[str, Link] = field(default_factory=dict)
    _areas: dict[str, Area] = field(default_factory=dict)
    _tables: dict[int, bytes] = field(default_factory=dict)
    _blocks: OrderedDict[tuple[int, int], memoryview] = field(default_factory=OrderedDict)
    rebuilt: int = 0
    """Blocks that were computed from parity."""

    def __post_init__(self) -> None:
        self._homes = homes(Path(self.plan.run))

    def read(self, rank: int, begin: int, end: int, out: memoryview) -> None:
        """A range of a member's payload. Raises `DamagedError` where it cannot be had after all."""
        for number in range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            block, first = self.block(rank, number), number * BLOCK_BYTES
            low, high = max(begin, first), min(end, first + len(block))
            out[low - begin : high - begin] = block[low - first : high - first]

    def block(self, rank: int, number: int) -> memoryview:
        """A block of a member's payload."""
        key = rank, number
        if key not in self._blocks:
            self._blocks[key] = self._fetched(rank, number)
            while len(self._blocks) > CACHED:
                self._blocks.popitem(last=False)
        return self._blocks[key]

    def _fetched(self, rank: int, number: int) -> memoryview:
        size, _ = self._size(rank)
        table = self.table(rank)
        begin = len(table) + number * BLOCK_BYTES
        end = min(begin + BLOCK_BYTES, len(table) + size)
        share = self.plan.data.get(rank)
        if share is not None and number not in share.damaged:
            block = self._raw(share, "data", begin, end)
        else:
            block, self.rebuilt = self._decoded(rank, begin, end), self.rebuilt + 1
        if block_digest(block) != table[number * DIGEST : (number + 1) * DIGEST]:
            raise DamagedError(f"Block {number} of process {rank}'s snapshot of step {self.plan.version.step} is damaged.")
        return block

    def _size(self, rank: int) -> tuple[int, str]:
        known = self.plan.size(rank)
        if known is None:
            raise DamagedError(f"Nothing is left of process {rank}'s snapshot of step {self.plan.version.step}.")
        return known

    def table(self, rank: int) -> bytes:
        """The digests of a member's blocks, padded as in its body."""
        if rank not in self._tables:
            size, root = self._size(rank)
            length = table_bytes(size)
            share = self.plan.data.get(rank)
            table = bytes(self._raw(share, "data", 0, length) if share is not None else self._decoded(rank, 0, length))
            if block_digest(table).hex() != root:
                raise DamagedError(f"The digests of process {rank}'s snapshot of step {self.plan.version.step} are damaged.")
            self._tables[rank] = table
        return self._tables[rank]

    def _decoded(self, rank: int, begin: int, end: int) -> memoryview:
        """A range of a body, computed from what the others of the group hold."""
        code, out, filled = self.plan.code(rank), bytearray(end - begin), 0
        if code is None:
            raise DamagedError(f"Process {rank}'s snapshot of step {self.plan.version.step} is damaged and has no parity.")
        for piece in self.plan.pieces(rank, begin, end):
            shares = {}
            for number, (kind, other, first) in list(self.plan.sources(rank, piece).items())[: code.blocks]:
                share = self.plan.data[other] if kind == "data" else self.plan.parity[other]
                padded = np.zeros(piece.stop - piece.first, np.uint8)
                data = self._raw(share, kind, first, min(first + len(padded), share.header.body))
                padded[: len(data)] = np.frombuffer(data, np.uint8)
                shares[number] = padded
            wanted = code.decode(shares, piece.block)[piece.inside - piece.first : piece.last - piece.first]
            out[filled : filled + len(wanted)] = wanted.data
            filled += len(wanted)
        return memoryview(out)

    def _raw(self, share: Share, kind: str, begin: int, end: int) -> memoryview:
        """Bytes of a body as they lie, on this node or another."""
        if begin >= end:
            return memoryview(b"")
        home = self._homes.get(share.home)
        if home is None:
            raise GoneError(f"The keeper {share.home} is gone.")
        if home.node == node():
            if share.path not in self._areas:
                self._areas[share.path] = Area.open(Path(share.path))
            return self._areas[share.path].read(begin, end)
        if share.home not in self._links:
            self._links[share.home] = Link(home, timeout=120)
        return memoryview(self._links[share.home].ask_bytes("read", kind=kind, begin=begin, end=end, **self.plan.version._asdict())[1])

    def close(self) -> None:
        """End the conversations; what was read stays valid."""
        for link in self._links.values():
            link.close()
        self._links.clear()


class MemoryTensor(LazyTensor):
    """A tensor of a snapshot: any part of it is put together from the parts that the members hold."""

    def __init__(self, spec: TensorSpec, pieces: list[tuple[Part, int, int]], memory: MemoryReader) -> None:
        self.spec, self._pieces, self._memory = spec, pieces, memory

    def load(self, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.read_part(Part(self.name, (0,) * len(self.shape), self.shape), out)

    def view(self) -> torch.Tensor:
        return self.load()

    def flat(self, begin: int, end: int, out: torch.Tensor | None = None) -> torch.Tensor:
        found = self.load().reshape(-1)[begin:end]
        return found if out is None else out[: len(found)].copy_(found)

    def read_part(self, part: Part, out: torch.Tensor | None = None) -> torch.Tensor:
        import torch

        out = torch.empty(part.shape, dtype=self.dtype) if out is None else out
        covered = 0
        for stored, rank, begin in self._pieces:
            low = [max(a, b) for a, b in zip(part.offset, stored.offset, strict=True)]
            high = [min(a + m, b + n) for a, m, b, n in zip(part.offset, part.shape, stored.offset, stored.shape, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)) and part.shape:
                continue
            size = tuple(b - a for a, b in zip(low, high, strict=True))
            inner = Part(self.name, tuple(a - b for a, b in zip(low, stored.offset, strict=True)), size)
            target = out[Part(self.name, tuple(a - b for a, b in zip(low, part.offset, strict=True)), size).slices]
            target.copy_(self._items(stored, inner, rank, begin))
            covered += inner.count
        if covered != part.count:
            raise DamagedError(f"The snapshot holds {covered} of {part.count} items of '{self.name}'.")
        return out

    def _items(self, stored: Part, inner: Part, rank: int, begin: int) -> torch.Tensor:
        """A box of a stored part, reading from its first item to its last and nothing else."""
        import torch

        runs, item = list(spans(stored.shape, inner)), ITEM_BYTES[self.spec.dtype]
        if not runs:
            return torch.empty(inner.shape, dtype=self.dtype)
        first, last = runs[0].outer, runs[-1].outer + runs[-1].items
        raw = torch.empty((last - first) * item, dtype=torch.uint8)
        self._memory.read(rank, begin + first * item, begin + last * item, memoryview(raw.numpy().data))
        strides = [1] * len(stored.shape)
        for axis in range(len(strides) - 2, -1, -1):
            strides[axis] = strides[axis + 1] * stored.shape[axis + 1]
        return raw.view(self.dtype).as_strided(inner.shape, strides)


class MemoryFolder(TensorFolder):
    """All tensors of one stem of a snapshot."""

    def __init__(self, stem: str, tensors: Mapping[str, LazyTensor]) -> None:
        self.stem, self._tensors = stem, dict(tensors)

    def load(self, threads: int | None = None) -> dict[str, torch.Tensor]:
        return {name: tensor.load() for name, tensor in self._tensors.items()}


class Snapshot(Checkpoint):
    """A state in the memory of a run's keepers, with the same face as one on disk."""

    def __init__(self, plan: ParityLayout) -> None:
        super().__init__(Path(plan.run) / f"(step {plan.version.step} in memory)", None)
        self.plan, self.memory = plan, MemoryReader(plan)
        self.contents: dict[str, bytes] = {}
        """The small files, by name."""
        self.pieces: dict[str, list[tuple[Part, int, int]]] = {}
        """Of each stem the stored parts with the member that holds them and where they begin in its payload."""
        self.specs: dict[str, dict[str, TensorSpec]] = {}
        for rank in range(plan.members):
            self._take(rank)

    def _take(self, rank: int) -> None:
        """Read a member's index."""
        front = 8 + int.from_bytes(self._bytes(rank, 0, 8), "little")
        index = documents.parse(bytes(self._bytes(rank, 8, front)), "the index of a snapshot")
        for stem, entry in index["stems"].items():
            if "specs" in entry:
                self.specs[stem] = {name: TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in entry["specs"]}
            held = [(Part(name, tuple(offset), tuple(shape)), rank, front + begin) for name, offset, shape, begin in entry["parts"]]
            self.pieces.setdefault(stem, []).extend(held)
        for name, (begin, end) in index["files"].items():
            self.contents[name] = bytes(self._bytes(rank, front + begin, front + end))

    def _bytes(self, rank: int, begin: int, end: int) -> bytearray:
        out = bytearray(end - begin)
        self.memory.read(rank, begin, end, memoryview(out))
        return out

    @property
    def tensors(self) -> TensorFolder:  # type: ignore[override]
        return self._stem("model")

    @property
    def optimizer(self) -> TensorFolder | None:  # type: ignore[override]
        return self._stem("optimizer") if "optimizer" in self.specs else None

    @property
    def ingredients(self) -> TensorFolder | None:  # type: ignore[override]
        return self._stem("ingredients") if "ingredients" in self.specs else None

    @property
    def is_adapter(self) -> bool:  # type: ignore[override]
        return "model" not in self.specs

    def folder(self, stem: str) -> TensorFolder:
        return self._stem(stem)

    def _stem(self, stem: str) -> MemoryFolder:
        held: dict[str, list[tuple[Part, int, int]]] = {}
        for part, rank, begin in self.pieces.get(stem, []):
            held.setdefault(part.name, []).append((part, rank, begin))
        return MemoryFolder(stem, {name: MemoryTensor(spec, held.get(name, []), self.memory) for name, spec in self.specs[stem].items()})

    def read_file(self, name: str) -> bytes | None:
        return self.contents.get(name)

    def close(self) -> None:
        self.memory.close()
