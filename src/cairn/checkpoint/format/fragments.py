"""Checkpoints in stores that write objects whole: each process packs what it writes into fragments, an index says what lies where.

The safetensors files of such a checkpoint exist for readers only. A fragment holds boxes of tensors back to back; the
index (`fragments.json`) keeps the header of every file and, for each tensor, which box lies where. Sizes and block
digests in the manifest are those of the files as they would lie on a disk, so the checkpoint's digest is that of the
directory that `cairn export --whole` makes of it. Nothing can be renamed in a store: the manifest, written last, is
what makes a checkpoint exist.
"""

from __future__ import annotations

import json
import struct
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from cairn.checkpoint.format import blocks, documents, kinds
from cairn.checkpoint.format.blocks import Rows
from cairn.checkpoint.format.layout import ITEM_BYTES, LARGEST_HEADER, FileLayout, TensorSpec, parse_layout
from cairn.checkpoint.format.manifest import BLOCK_BYTES, MANIFEST, FileEntry, Manifest, block_digest
from cairn.checkpoint.format.parts import Part, boxes, common, in_short_rows, spans, within
from cairn.checkpoint.format.place import file_system, key, remove, sizes, write_new
from cairn.errors import DamagedError, InputError

INDEX = "fragments.json"
FORMAT = 1
FRAGMENT_BYTES = 32 * 2**20
"""Bytes of one fragment; each is sent in one request, and a process holds at most `UPLOADS` + 1 of them."""
UPLOADS = 4
OPEN_BLOCKS = 16
"""Blocks of a file that a process keeps in memory until it has written all of them; what is left is read back when all have written."""
GAP = 64 * 2**10
"""Bytes between two pieces of an object below which one request fetches both: a request of its own would cost more."""
FETCH_BYTES = 64 * 2**20
"""Bytes that are asked for at a time."""


class Box(NamedTuple):
    """A box of a tensor that lies in `fragment`, in C order, from its byte `begin` on."""

    fragment: str
    begin: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class FragmentReport(NamedTuple):
    """What a process tells the others of a file: bytes of each block that it has not written, and the boxes that it has."""

    missing: list[int]
    boxes: dict[str, list[Box]]
    fragments: dict[str, int]


class Store:
    """A place in a store that one or several processes fill; it exists for readers once the manifest does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written: list[str] = []
        self._packer: _Packer | None = None

    def begin(self) -> str:
        """Refuse a place where something lies; returns what the others need to join."""
        found = sizes(self.path)
        if MANIFEST in found:
            raise InputError(f"{self.path} exists; a checkpoint is never overwritten, choose another name.")
        if found:
            raise InputError(f"{self.path} holds {len(found)} objects of something unfinished; remove them or choose another name.")
        return uuid.uuid4().hex[:8]

    def join(self, token: str, rank: int) -> None:
        """Take part in what the first process has begun. The token keeps fragments of an earlier, broken attempt apart."""
        self._packer = _Packer(self.path, f"fragment-{token}-{rank:05d}")

    def open(self, plan: FileLayout, pool: Executor, *, create: bool) -> LogicalFile:
        """A file that will exist for readers; the process that creates it counts its header."""
        assert self._packer is not None
        return LogicalFile(self.path, plan, self._packer, create=create)

    def put(self, filename: str, data: bytes) -> None:
        """Write a small object, which must not be there: of two writers that race for one place, one is refused here."""
        try:
            write_new(self.path / filename, data)
        except FileExistsError:
            raise InputError(f"{self.path} appeared while it was being written; a checkpoint is never overwritten.") from None
        self._written.append(filename)

    def show(
        self, entries: Mapping[str, FileEntry], files: Mapping[str, LogicalFile], told: Sequence[Mapping[str, FragmentReport]], uncut: Mapping[str, FileEntry]
    ) -> None:
        """Write the index, and the manifest last."""
        index = {name: file.entry([process[name] for process in told]) for name, file in files.items()}
        fragments = {name: size for process in told for each in process.values() for name, size in each.fragments.items()}
        document = json.dumps({"format": FORMAT, "files": index}, ensure_ascii=False, separators=(",", ":")).encode()
        self.put(INDEX, document)
        self.put(MANIFEST, Manifest.of(dict(entries), fragments=fragments | {INDEX: len(document)}, uncut=dict(uncut)).dump())

    def abort(self) -> None:
        """Remove what this process wrote."""
        names = self._written + (self._packer.abandon() if self._packer is not None else [])
        self._written = []
        for name in names:
            if file_system(self.path).exists(key(self.path / name)):
                file_system(self.path).rm_file(key(self.path / name))


def sweep(directory: Path) -> list[Path]:
    """Remove what unfinished writers left in a run's place in a store: steps without a manifest."""
    broken = [path for path in directory.glob("step-*") if sizes(path) and MANIFEST not in sizes(path)]
    for path in broken:
        remove(path, MANIFEST)
    return broken


class _Packer:
    """The fragments of one process: takes bytes from any thread, sends a fragment as soon as it is full."""

    def __init__(self, path: Path, prefix: str) -> None:
        self._path, self._prefix = path, prefix
        self._buffer, self._lock = bytearray(), threading.Lock()
        self._pool = ThreadPoolExecutor(UPLOADS, thread_name_prefix="cairn-send")
        self._room = threading.BoundedSemaphore(UPLOADS)
        self._sent: list[Future[None]] = []
        self.sizes: dict[str, int] = {}

    @property
    def _name(self) -> str:
        return f"{self._prefix}-{len(self.sizes):05d}.bin"

    def add(self, data: memoryview, item: int) -> list[tuple[str, int, int, int]]:
        """Take whole items; returns where they went: (fragment, byte in it, first and end byte of `data`)."""
        found, done = [], 0
        with self._lock:
            while done < len(data):
                count = min(len(data) - done, (FRAGMENT_BYTES - len(self._buffer)) // item * item)
                if count:
                    found.append((self._name, len(self._buffer), done, done + count))
                    self._buffer += data[done : done + count]
                    done += count
                if len(self._buffer) + item > FRAGMENT_BYTES:
                    self._send()
        return found

    def _send(self) -> None:
        name, data = self._name, bytes(self._buffer)
        self.sizes[name], self._buffer = len(data), bytearray()
        self._room.acquire()
        self._sent.append(self._pool.submit(self._upload, name, data))

    def _upload(self, name: str, data: bytes) -> None:
        try:
            file_system(self._path).pipe_file(key(self._path / name), data)
        finally:
            self._room.release()

    def flush(self) -> dict[str, int]:
        """Send the rest and wait until everything has arrived; names and sizes of all fragments."""
        with self._lock:
            if self._buffer:
                self._send()
        for future in self._sent:
            future.result()
        self._pool.shutdown()
        return dict(self.sizes)

    def abandon(self) -> list[str]:
        """Stop sending; the names of what may have been sent."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        return list(self.sizes)


class LogicalFile:
    """A safetensors file that exists for readers only: takes parts of tensors from any thread, digests the blocks that it can."""

    def __init__(self, path: Path, plan: FileLayout, packer: _Packer, *, create: bool) -> None:
        self.size, self._path, self._plan, self._packer = plan.size, path, plan, packer
        self._missing = blocks.sizes(plan.size)
        self._open: OrderedDict[int, bytearray] = OrderedDict()
        self._digests: dict[int, str] = {}
        self._boxes: dict[str, list[Box]] = {}
        self._lock = threading.Lock()
        if create:
            self._fill(0, memoryview(plan.header))

    def put_bytes(self, spec: TensorSpec, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor, from `offset` bytes into it; whole items."""
        item = ITEM_BYTES[spec.dtype]
        if offset % item or len(data) % item:
            raise ValueError(f"{len(data)} bytes at {offset} are not whole items of '{spec.name}'; a store takes whole items")
        done = 0
        for part in boxes(spec.name, spec.shape, offset // item, (offset + len(data)) // item):
            self.put_part(spec, part, data[done : done + part.count * item])
            done += part.count * item

    def put_part(self, spec: TensorSpec, part: Part, data: memoryview) -> None:
        """Write a part of a tensor."""
        begin, item = self._plan.ranges[spec.name][0], ITEM_BYTES[spec.dtype]
        for fragment, position, first, end in self._packer.add(data, item):
            for piece in boxes(spec.name, part.shape, first // item, end // item):
                offset = tuple(map(sum, zip(part.offset, piece.offset, strict=True)))
                with self._lock:
                    self._boxes.setdefault(spec.name, []).append(Box(fragment, position, offset, piece.shape))
                position += piece.count * item
        if in_short_rows(spec.shape, part, item):
            where = begin + (part.offset[0] * spec.shape[1] + part.offset[1]) * item
            with self._lock:
                for block, count in Rows(where, part.shape[0], part.shape[1] * item, spec.shape[1] * item).by_block():
                    self._missing[block] -= count
                    self._open.pop(block, None)  # its bytes come in too many pieces to be collected here
        else:
            for span in spans(spec.shape, part):
                self._fill(begin + span.outer * item, data[span.inner * item : (span.inner + span.items) * item])

    def _fill(self, begin: int, data: memoryview) -> None:
        """Count bytes of the file, and digest each block whose bytes have all passed here."""
        end = begin + len(data)
        for block in range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            start = block * BLOCK_BYTES
            size = min(BLOCK_BYTES, self.size - start)
            piece = data[max(start - begin, 0) : start + size - begin]
            with self._lock:
                untouched = self._missing[block] == size
                self._missing[block] -= len(piece)
                if untouched and len(piece) < size:
                    self._open[block] = bytearray(size)
                    if len(self._open) > OPEN_BLOCKS:
                        self._open.popitem(last=False)
                if block in self._open:
                    position = max(begin, start) - start
                    self._open[block][position : position + len(piece)] = piece
                    piece = memoryview(self._open.pop(block)) if self._missing[block] == 0 else data[:0]
            if len(piece) == size and size:
                self._digests[block] = block_digest(piece)

    def told(self) -> FragmentReport:
        """Send what is left; what the others must know before blocks that several wrote to are digested."""
        return FragmentReport(list(self._missing), self._boxes, self._packer.flush())

    def left_open(self, told: Sequence[FragmentReport]) -> list[int]:
        """The blocks that no process completed alone. Raises `CairnError` unless every byte was written exactly once."""
        return blocks.left_open(self._plan.filename, self.size, [each.missing for each in told])

    def finish(self, also: Sequence[int], told: Sequence[FragmentReport]) -> dict[int, str]:
        """The digests of the blocks completed here and of those in `also`, which are read back from the store."""
        mine = [block for block, count in enumerate(self._missing) if count == 0 and block not in self._digests]
        stored = StoredFile(self._path, self._plan, merged(told))
        for block in [*mine, *also]:
            self._digests[block] = block_digest(stored.read(block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, self.size)))
        return self._digests

    def entry(self, told: Sequence[FragmentReport]) -> dict[str, Any]:
        """What the index says of this file."""
        return {"header": self._plan.header[8:].decode(), "tensors": merged(told)}

    def written(self, told: Sequence[FragmentReport]) -> Callable[[memoryview, int], None]:
        """Fills a buffer with what was written, from a position on; it is read back from the store."""
        return StoredFile(self._path, self._plan, merged(told)).fill

    def close(self) -> None:
        self._open.clear()


def merged(told: Sequence[FragmentReport]) -> dict[str, list[Box]]:
    """The boxes of every tensor, from all processes."""
    found: dict[str, list[Box]] = {}
    for each in told:
        for name, pieces in each.boxes.items():
            found.setdefault(name, []).extend(pieces)
    return found


class StoredFile:
    """A safetensors file that lies in fragments, as readers see it."""

    def __init__(self, path: Path, layout: FileLayout, pieces: Mapping[str, Sequence[Box]]) -> None:
        self.path, self.layout, self._pieces = path, layout, pieces
        self._specs = {spec.name: spec for spec in layout.specs}

    def read(self, begin: int, end: int) -> bytes:
        """Bytes of the file; both ends lie on items."""
        out = bytearray(self.layout.header[begin:end].ljust(end - begin, b"\0"))
        for name, (first, last) in self.layout.ranges.items():
            low, high = max(begin, first), min(end, last)
            if low < high:
                self.read_range(name, low - first, memoryview(out)[low - begin : high - begin])
        return bytes(out)

    def fill(self, target: memoryview, begin: int) -> None:
        """Fill `target` with bytes of the file from `begin` on; both ends lie on items."""
        target[:] = self.read(begin, begin + len(target))

    def read_range(self, name: str, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes of a tensor from `offset` on; both ends lie on items."""
        spec, done = self._specs[name], 0
        item = ITEM_BYTES[spec.dtype]
        for part in boxes(name, spec.shape, offset // item, (offset + len(target)) // item):
            self.read_part(part, target[done : done + part.count * item])
            done += part.count * item

    def read_part(self, part: Part, target: memoryview) -> None:
        """Fill `target` with a part of a tensor, in C order, fetching no other boxes."""
        import numpy as np

        if not part.count:
            return
        item = ITEM_BYTES[self._specs[part.name].dtype]
        out = np.frombuffer(target, np.uint8).reshape(*part.shape, item)
        found = [(common(part, Part(part.name, box.offset, box.shape)), box) for box in self._pieces.get(part.name, ())]
        for shared, box in found:
            if shared.count:
                inside = within(shared, Part(part.name, box.offset, box.shape))
                data = np.frombuffer(self._fetch(box, inside, item), np.uint8)
                out[within(shared, part).slices] = data.reshape(*shared.shape, item)

    def _fetch(self, box: Box, inside: Part, item: int) -> bytearray:
        """A box within a stored box, in C order."""
        out, fs, fragment = bytearray(inside.count * item), file_system(self.path), key(self.path / box.fragment)
        for group in _grouped(spans(box.shape, inside), item):
            first, last = group[0].outer * item, (group[-1].outer + group[-1].items) * item
            data = memoryview(fs.cat_file(fragment, start=box.begin + first, end=box.begin + last))
            if len(data) != last - first:
                raise DamagedError(f"{self.path / box.fragment} ends before byte {box.begin + last}.")
            for span in group:
                out[span.inner * item : (span.inner + span.items) * item] = data[span.outer * item - first : (span.outer + span.items) * item - first]
        return out


def _grouped(runs: Iterator[Any], item: int) -> Iterator[list[Any]]:
    """Runs of items that one request fetches together."""
    group: list[Any] = []
    for span in runs:
        if group:
            gap = (span.outer - group[-1].outer - group[-1].items) * item
            if gap > GAP or (span.outer + span.items - group[0].outer) * item > FETCH_BYTES:
                yield group
                group = []
        group.append(span)
    if group:
        yield group


class _Entry(kinds.File):
    """What the index says of one file: the header that it would have and, for each tensor, `[fragment, begin, offset, shape]` of its boxes."""

    header: str
    tensors: dict[str, list[list[Any]]]


class _Index(kinds.File):
    """fragments.json."""

    format: kinds.Whole
    files: dict[str, _Entry]


def load_index(path: Path, manifest: Manifest) -> dict[str, StoredFile]:
    """The files of a checkpoint that lies in fragments. Raises `DamagedError` if the index is not sound."""
    where = path / INDEX
    try:
        index = documents.validated(_Index, documents.read_object(where, limit=LARGEST_HEADER), where)
    except FileNotFoundError:
        raise DamagedError(f"{path} has no {INDEX}.") from None
    files = {}
    for name, entry in index.files.items():
        if name not in manifest.files:
            raise DamagedError(f"{where} describes {name[:80]}, which the manifest does not know.")
        text = entry.header.encode()
        layout = parse_layout(path / name, struct.pack("<Q", len(text)) + text, manifest.files[name].size)
        pieces = {tensor: [_box(where, tensor, box, manifest.fragments) for box in boxes] for tensor, boxes in entry.tensors.items()}
        files[name] = StoredFile(path, layout, pieces)
        for spec in layout.specs:
            _check(path, spec, pieces.get(spec.name, []), manifest.fragments)
    return files


def _box(where: Path, tensor: str, box: list[Any], fragments: Mapping[str, int]) -> Box:
    whole = len(box) == 4 and isinstance(box[2], list) and isinstance(box[3], list) and isinstance(box[0], str) and box[0] in fragments
    if not whole or not all(type(n) is int and 0 <= n <= kinds.LARGEST_WHOLE for n in (box[1], *box[2], *box[3])) or len(box[2]) != len(box[3]):
        raise DamagedError(f"{where} is not a valid index of fragments: a box of tensor '{tensor[:80]}' is not sound.")
    return Box(box[0], box[1], tuple(box[2]), tuple(box[3]))


def _check(path: Path, spec: TensorSpec, pieces: Sequence[Box], fragments: Mapping[str, int]) -> None:
    item, whole = ITEM_BYTES[spec.dtype], Part(spec.name, (0,) * len(spec.shape), spec.shape)
    found = [Part(spec.name, box.offset, box.shape) for box in pieces]
    if any(len(part.shape) != len(spec.shape) for part in found):
        raise DamagedError(f"{path / INDEX}: a box of tensor '{spec.name[:80]}' has other dimensions than the tensor.")
    inside = all(common(whole, part) == part and box.begin + part.count * item <= fragments[box.fragment] for part, box in zip(found, pieces, strict=True))
    if not inside or sum(part.count for part in found) * item != spec.nbytes:
        raise DamagedError(f"{path / INDEX}: the boxes of tensor '{spec.name}' do not make up the tensor.")
