"""Which state the keepers of a run can give back, and reading it: from memory, else out of parity, else not at all.

The keepers' own headers are the truth; nothing else is asked. A version counts only if every member's part of it is
there or can be computed from the others' to the last block, and parts of two versions never come together.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cairn.checkpoint.layout import ITEM_BYTES, TensorSpec
from cairn.checkpoint.manifest import BLOCK_BYTES
from cairn.checkpoint.memory.area import DIGEST, Area, Header, Version, block_digest
from cairn.checkpoint.memory.link import GoneError, Home, Link, homes, links, node
from cairn.checkpoint.memory.parity import WORD, Code
from cairn.checkpoint.parts import Part, spans
from cairn.checkpoint.read import Checkpoint, LazyTensor, TensorFolder
from cairn.errors import DamagedError

if TYPE_CHECKING:
    import torch

CACHED = 16
"""Blocks that were fetched or computed and are kept for the next read."""


@dataclass(frozen=True)
class Share:
    """One member's data, or its parity, of a version: what is said of it, at which keeper, and which blocks are damaged."""

    header: Header
    home: str
    path: str
    damaged: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A version and where its shares are, by rank."""

    run: str
    version: Version
    data: Mapping[int, Share]
    parity: Mapping[int, Share]

    @property
    def members(self) -> int:
        return next(iter({**self.parity, **self.data}.values())).header.members

    @property
    def lost(self) -> list[int]:
        """The members whose memory is gone."""
        return [rank for rank in range(self.members) if rank not in self.data]

    def group(self, rank: int) -> Sequence[int]:
        """The members that protect one another and this one; it alone if it is unprotected, or all of them are lost."""
        return next((share.header.group for share in (*self.data.values(), *self.parity.values()) if rank in share.header.group), [rank])

    def code(self, rank: int) -> Code | None:
        """How this member's group is coded."""
        group = self.group(rank)
        parity = max((self.parity[other].header.parity for other in group if other in self.parity), default=0)
        return Code(len(group), parity) if parity else None

    def size(self, rank: int) -> tuple[int, str] | None:
        """Bytes of a member's body and their root digest, as it or those of its group that hold parity say."""
        if rank in self.data:
            return self.data[rank].header.body, self.data[rank].header.root
        for other in self.group(rank):
            header = self.parity[other].header if other in self.parity else None
            if header is not None:
                return header.sizes[rank], header.roots[rank]
        return None

    def pieces(self, rank: int, begin: int, end: int) -> Iterator[Piece]:
        """A range of a lost or damaged member's body as ranges of stripes' blocks."""
        code, group = self.code(rank), self.group(rank)
        assert code is not None
        size = code.block_bytes(max(self._sizes(group)))
        position = begin
        while position < end:
            block, inside = divmod(position, size)
            last = min(size, inside + end - position, inside + BLOCK_BYTES)
            # Aligned outwards: a Reed-Solomon code takes whole words.
            first, stop = inside // WORD * WORD, min(size, -(-last // WORD) * WORD)
            yield Piece(block, code.stripe(group.index(rank), block), size, first, stop, inside, last)
            position += last - inside

    def _sizes(self, group: Sequence[int]) -> list[int]:
        return [known[0] for rank in group if (known := self.size(rank)) is not None]

    def sources(self, rank: int, piece: Piece) -> dict[int, tuple[str, int, int]]:
        """For a range of a stripe the shares that are whole there: number in the code -> (kind, rank, where it begins)."""
        code, group, found = self.code(rank), self.group(rank), dict[int, tuple[str, int, int]]()
        assert code is not None
        for position, other in enumerate(group):
            block = code.block(piece.stripe, position)
            if block is not None and other != rank and other in self.data:
                begin = block * piece.size + piece.first
                if not _touches(self.data[other], begin, begin + piece.stop - piece.first):
                    found[block] = ("data", other, begin)
        for number in range(code.parity):
            other = group[code.holder(piece.stripe, number)]
            if other in self.parity:
                share = self.parity[other]
                begin = share.header.table + number * piece.size + piece.first
                if not _touches(share, begin, begin + piece.stop - piece.first):
                    found[code.blocks + number] = ("parity", other, begin)
        return found

    def whole(self) -> bool:
        """Whether every byte of the version can be had."""
        if not self.data and not self.parity:
            return False
        for rank in range(self.members):
            known = self.size(rank)
            if known is None:
                return False
            missing = [(0, known[0])] if rank not in self.data else [_block_range(self.data[rank].header, n) for n in self.data[rank].damaged]
            if missing and self.code(rank) is None:
                return False
            for begin, end in missing:
                code = self.code(rank)
                if any(code is None or len(self.sources(rank, piece)) < code.blocks for piece in self.pieces(rank, begin, end)):
                    return False
        return True


@dataclass(frozen=True)
class Piece:
    """Bytes `first` to `stop` of a block of a stripe, of which `inside` to `last` are wanted; the stripe's blocks have `size` bytes."""

    block: int
    stripe: int
    size: int
    first: int
    stop: int
    inside: int
    last: int


def _block_range(header: Header, number: int) -> tuple[int, int]:
    """Where a block of the payload lies in the body."""
    begin = header.table + number * BLOCK_BYTES
    return begin, min(begin + BLOCK_BYTES, header.body)


def _touches(share: Share, begin: int, end: int) -> bool:
    """Whether a range of a body has damaged bytes in it."""
    ranges = [_block_range(share.header, number) for number in share.damaged]
    return any(first < end and begin < last for first, last in ranges)


def find(run: Path, at_least: int = 0) -> Plan | None:
    """The newest version, of that step or later, that a run's keepers can give back whole. Every block of it has been checked."""
    shares: dict[Version, dict[str, dict[int, Share]]] = {}
    for link in links(run):
        try:
            areas = link.ask("status")["areas"]
        except GoneError:
            continue
        for area in areas:
            if area["state"] == "clean" and area["header"] is not None:
                header = Header.model_validate(area["header"])
                kinds = shares.setdefault(header.version, {"data": {}, "parity": {}})
                kinds[area["kind"]][header.member] = Share(header, link.home.name, area["path"])
    # A later attempt began with the newest state that there was: its versions come first.
    for version in sorted(shares, key=lambda version: (version.attempt, version.step), reverse=True):
        plan = Plan(str(run), version, shares[version]["data"], shares[version]["parity"])
        if version.step >= at_least and plan.whole():
            plan = _checked(plan)
            if plan.whole():
                return plan
    return None


def _checked(plan: Plan) -> Plan:
    """The plan after every keeper has compared its blocks with their digests."""
    found: dict[str, dict[str, Any]] = {}
    for name, home in homes(Path(plan.run)).items():
        if any(share.home == name for share in (*plan.data.values(), *plan.parity.values())):
            try:
                with Link(home, timeout=600) as link:
                    found[name] = link.ask("check", **plan.version._asdict())
            except GoneError:
                continue

    def still(shares: Mapping[int, Share], kind: str) -> dict[int, Share]:
        damage = {rank: found.get(share.home, {}).get(kind) for rank, share in shares.items()}
        return {rank: Share(s.header, s.home, s.path, tuple(bad)) for rank, s in shares.items() if (bad := damage[rank]) is not None}

    return Plan(plan.run, plan.version, still(plan.data, "data"), still(plan.parity, "parity"))


@dataclass
class Memory:
    """A planned version, read block by block; every block is compared with its digest before it is used."""

    plan: Plan
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
        """A range of a member's payload. Raises `DamagedError` where it can not be had after all."""
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
        body, _ = self._size(rank)
        table = self.table(rank)
        begin = len(table) + number * BLOCK_BYTES
        end = min(begin + BLOCK_BYTES, body)
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
            body, root = self._size(rank)
            length = _table_bytes(body)
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


def _table_bytes(body: int) -> int:
    """Bytes of the digests in front of a payload, from the bytes of both together."""
    blocks = 0
    while True:
        header = Header(step=0, attempt="", member=0, members=1, group=[0], parity=0, size=blocks * BLOCK_BYTES)
        if header.body >= body:
            return header.table
        blocks = max(blocks + 1, (body - header.table) // BLOCK_BYTES)


class MemoryTensor(LazyTensor):
    """A tensor of a snapshot: any part of it is put together from the parts that the members hold."""

    def __init__(self, spec: TensorSpec, pieces: list[tuple[Part, int, int]], memory: Memory) -> None:
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

    def __init__(self, plan: Plan) -> None:
        super().__init__(Path(plan.run) / f"(step {plan.version.step} in memory)", None)
        self.plan, self.memory = plan, Memory(plan)
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
        index = json.loads(self._bytes(rank, 8, front))
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

    def _stem(self, stem: str) -> MemoryFolder:
        held: dict[str, list[tuple[Part, int, int]]] = {}
        for part, rank, begin in self.pieces.get(stem, []):
            held.setdefault(part.name, []).append((part, rank, begin))
        return MemoryFolder(stem, {name: MemoryTensor(spec, held.get(name, []), self.memory) for name, spec in self.specs[stem].items()})

    def _json(self, name: str) -> dict[str, Any] | None:
        return json.loads(self.contents[name]) if name in self.contents else None

    def close(self) -> None:
        self.memory.close()
