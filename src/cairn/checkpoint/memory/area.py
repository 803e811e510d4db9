"""An area of shared memory: a file in tmpfs that one process fills and another owns, and that outlives both.

    0     magic, state (one word: empty, writing or clean), length of the header
    64    header (JSON): version, whose state it is, lengths, root digest
    4096  body: the digest of each block of the payload, then the payload

An area is clean from the moment the state word says so, and only while its digests agree with the root in its header. The
order of the writes (state, header, payload, digests, header, state) makes a death between any two of them show as an
area that is not clean; it never shows half of a snapshot as a whole one.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3
from pydantic import ValidationError

from cairn.checkpoint.format.manifest import BLOCK_BYTES
from cairn.errors import DamagedError, InputError
from cairn.options import Options

MAGIC = b"CAIRNMEM"
EMPTY, WRITING, CLEAN = 0, 1, 2
STATES = ("empty", "writing", "clean")
HEADER, BODY = 64, 4096
DIGEST, ALIGNMENT = 32, 64
GRAIN = 2**20
"""Files grow in steps of this, so that a snapshot a few bytes longer than the last fits into the same file."""


class Version(NamedTuple):
    """A state of a run: `step`, and the attempt (a start of the job) that computed it. The same step of two attempts never mixes."""

    step: int
    attempt: str


class Header(Options):
    """What an area holds."""

    step: int
    attempt: str
    member: int
    """The process, by rank, whose state or parity this is."""
    members: int
    group: list[int]
    """The members that protect each other, in the order of their positions."""
    parity: int
    size: int
    """Bytes of the payload."""
    root: str = ""
    sizes: dict[int, int] = {}
    """In an area of parity: bytes of each member's payload,"""
    roots: dict[int, str] = {}
    """and its root digest."""

    @property
    def version(self) -> Version:
        return Version(self.step, self.attempt)

    @property
    def blocks(self) -> int:
        """Blocks of the payload, each with a digest of its own."""
        return -(-self.size // BLOCK_BYTES)

    @property
    def table(self) -> int:
        """Bytes of the digests."""
        return table_bytes(self.size)

    @property
    def body(self) -> int:
        """Bytes of digests and payload together: what parity protects."""
        return self.table + self.size


class Area:
    """One such file. The process that creates it owns it; others `open` it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        if path.exists():
            self._open()

    @classmethod
    def open(cls, path: Path) -> Area:
        """An area that somebody else has made. Raises `DamagedError` if it is not one."""
        area = cls(path)
        if area._map is None:
            raise DamagedError(f"{path} is not an area of shared memory.")
        return area

    def _open(self) -> None:
        with self.path.open("r+b") as file:
            size = os.fstat(file.fileno()).st_size
            if size >= BODY:
                mapped = mmap.mmap(file.fileno(), size)
                self._map = mapped if mapped[: len(MAGIC)] == MAGIC else None

    @property
    def capacity(self) -> int:
        """Bytes of the body that fit."""
        return len(self._map) - BODY if self._map is not None else 0

    @property
    def state(self) -> int:
        """EMPTY, WRITING or CLEAN, as the word says."""
        return struct.unpack_from("<Q", self._map, 8)[0] if self._map is not None else EMPTY

    def _set(self, state: int) -> None:
        assert self._map is not None
        struct.pack_into("<Q", self._map, 8, state)

    @property
    def header(self) -> Header | None:
        """What the header says; None if it is empty or not sound."""
        if self._map is None or self.state == EMPTY:
            return None
        length = struct.unpack_from("<Q", self._map, 16)[0]
        if not 0 < length <= BODY - HEADER:
            return None
        try:
            header = Header.model_validate_json(self._map[HEADER : HEADER + length])
        except ValidationError:
            return None
        return header if header.body <= self.capacity else None

    def _set_header(self, header: Header) -> None:
        assert self._map is not None
        text = header.model_dump_json().encode()
        if len(text) > BODY - HEADER:
            raise InputError(f"A group of {len(header.group)} nodes is too large for its parity; set fault_tolerance.memory.group to at most 32.")
        struct.pack_into("<Q", self._map, 16, len(text))
        self._map[HEADER : HEADER + len(text)] = text

    @property
    def clean(self) -> Header | None:
        """The header, if this is a whole snapshot: the state says so and the digests are those that were written."""
        header = self.header if self.state == CLEAN else None
        return header if header is not None and self.root(header) == header.root else None

    def root(self, header: Header) -> str:
        """Digest of the digests."""
        return blake3(self.read(0, header.table)).hexdigest()

    def begin(self, header: Header) -> None:
        """Make room for a payload and mark it as being written. Raises `InputError` if the memory is full."""
        if self._map is not None:
            self._set(EMPTY)
        self._fit(header.body)
        self._set_header(header)
        self._set(WRITING)

    def _fit(self, size: int) -> None:
        if size <= self.capacity <= 2 * size + GRAIN:
            return
        # A new file: a process that still maps the old one keeps it for as long as it needs it.
        self._map = None
        self.path.unlink(missing_ok=True)
        total = -(-(BODY + size) // GRAIN) * GRAIN
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            # All of it now: memory that is missing must be an error here, not a SIGBUS in the middle of a copy.
            os.posix_fallocate(fd, 0, total)
            os.pwrite(fd, MAGIC, 0)
        except OSError as error:
            self.path.unlink()
            raise InputError(
                f"{self.path.parent} has no room for a snapshot of {total / 2**20:.0f} MiB ({error.strerror}); "
                "free some, or name a larger place in $CAIRN_MEMORY."
            ) from None
        finally:
            os.close(fd)
        self._open()

    def write(self, begin: int, data: bytes | memoryview) -> None:
        """Write into the payload at `begin`."""
        header = self.header
        assert header is not None and self._map is not None
        start = BODY + header.table + begin
        self._map[start : start + len(data)] = data

    def payload(self) -> memoryview:
        """The payload, writable."""
        header = self.header
        assert header is not None and self._map is not None
        return memoryview(self._map)[BODY + header.table : BODY + header.body]

    def read(self, begin: int, end: int) -> memoryview:
        """A range of the body."""
        assert self._map is not None
        return memoryview(self._map)[BODY + begin : BODY + end]

    def seal(self, **known: object) -> Header:
        """Digest the payload and mark the area as clean; `known` fields join the header."""
        header = self.header
        assert header is not None and self._map is not None and self.state == WRITING
        for number, digest in enumerate(self._digests(header)):
            self._map[BODY + number * DIGEST : BODY + (number + 1) * DIGEST] = digest
        self._map[BODY + header.blocks * DIGEST : BODY + header.table] = bytes(header.table - header.blocks * DIGEST)
        sealed = header.model_copy(update={"root": self.root(header), **known})
        self._set_header(sealed)
        self._set(CLEAN)
        return sealed

    def _digests(self, header: Header) -> Iterator[bytes]:
        for begin in range(0, header.size, BLOCK_BYTES):
            yield block_digest(self.read(header.table + begin, header.table + min(begin + BLOCK_BYTES, header.size)))

    def damaged(self) -> list[int]:
        """The blocks of a clean area whose bytes are no longer those that were written."""
        header = self.header
        assert header is not None
        return [number for number, digest in enumerate(self._digests(header)) if digest != self.read(number * DIGEST, (number + 1) * DIGEST)]

    def clear(self) -> None:
        """Forget what is in it."""
        if self._map is not None:
            self._set(EMPTY)

    def remove(self) -> None:
        """Give the memory back."""
        self.clear()
        self._map = None
        self.path.unlink(missing_ok=True)


def table_bytes(size: int) -> int:
    """Bytes of the digests in front of a payload of `size` bytes, padded so that it is aligned."""
    blocks = -(-size // BLOCK_BYTES)
    return -(-blocks * DIGEST // ALIGNMENT) * ALIGNMENT


def block_digest(data: bytes | memoryview) -> bytes:
    """Digest of one block, as it stands in the table."""
    return blake3(data).digest()
