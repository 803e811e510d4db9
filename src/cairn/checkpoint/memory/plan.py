"""Which state the keepers of a run can give back whole.

The keepers' own headers are the truth; nothing else is asked. A version counts only if every member's part of it is
there or can be computed from the others' to the last block, and parts of two versions never come together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cairn.checkpoint.format.manifest import BLOCK_BYTES
from cairn.checkpoint.memory.area import Header, Version, table_bytes
from cairn.checkpoint.memory.link import GoneError, Link, homes, links
from cairn.checkpoint.memory.parity import WORD, Code


@dataclass(frozen=True)
class Share:
    """One member's data, or its parity, of a version: what is said of it, at which keeper, and which blocks are damaged."""

    header: Header
    home: str
    path: str
    damaged: tuple[int, ...] = ()


@dataclass(frozen=True)
class ParityLayout:
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
        """Bytes of a member's payload and its root digest, as it or those of its group that hold parity say."""
        if rank in self.data:
            return self.data[rank].header.size, self.data[rank].header.root
        for other in self.group(rank):
            header = self.parity[other].header if other in self.parity else None
            if header is not None:
                return header.sizes[rank], header.roots[rank]
        return None

    def pieces(self, rank: int, begin: int, end: int) -> Iterator[ParityPiece]:
        """A range of a lost or damaged member's body as ranges of stripes' blocks."""
        code, group = self.code(rank), self.group(rank)
        assert code is not None
        size = code.block_bytes(max(table_bytes(known[0]) + known[0] for other in group if (known := self.size(other)) is not None))
        position = begin
        while position < end:
            block, inside = divmod(position, size)
            last = min(size, inside + end - position, inside + BLOCK_BYTES)
            # Aligned outwards: a Reed-Solomon code takes whole words.
            first, stop = inside // WORD * WORD, min(size, -(-last // WORD) * WORD)
            yield ParityPiece(block, code.stripe(group.index(rank), block), size, first, stop, inside, last)
            position += last - inside

    def sources(self, rank: int, piece: ParityPiece) -> dict[int, tuple[str, int, int]]:
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
            missing = [(0, table_bytes(known[0]) + known[0])]
            if rank in self.data:
                missing = [_block_range(self.data[rank].header, number) for number in self.data[rank].damaged]
            if missing and self.code(rank) is None:
                return False
            for begin, end in missing:
                code = self.code(rank)
                if any(code is None or len(self.sources(rank, piece)) < code.blocks for piece in self.pieces(rank, begin, end)):
                    return False
        return True


@dataclass(frozen=True)
class ParityPiece:
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


def find(run: Path, at_least: int = 0) -> ParityLayout | None:
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
        plan = ParityLayout(str(run), version, shares[version]["data"], shares[version]["parity"])
        if version.step >= at_least and plan.whole():
            plan = _checked(plan)
            if plan.whole():
                return plan
    return None


def _checked(plan: ParityLayout) -> ParityLayout:
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

    return ParityLayout(plan.run, plan.version, still(plan.data, "data"), still(plan.parity, "parity"))
