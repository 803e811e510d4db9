"""Writing a checkpoint: staged beside its place, every byte range written once, digested, then published in one rename.

    with Writer(path) as writer:
        writer.declare("model", specs)              # headers are computed and the files allocated here
        writer.put("model", name, tensor)           # any order, any thread
        writer.put_json("config.json", config)
        checkpoint = writer.publish(lineage)

Until `publish` nothing is visible under `path`; if anything fails, or the process dies, nothing ever is. Blocks are
digested in the background from the pages just written, while further bytes are copied and flushed.

Several processes write one checkpoint by giving their `Peers`: every one of them declares the same tensors, puts the
parts that it owns, and publishes. The files are the same, byte for byte, as if one had written them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cairn.checkpoint import layout, read
from cairn.checkpoint.layout import FileLayout, TensorSpec
from cairn.checkpoint.lineage import Lineage
from cairn.checkpoint.manifest import BLOCK_BYTES, LINEAGE, MANIFEST, FileEntry, Manifest, block_digest, entry_of, plain_name
from cairn.checkpoint.parts import Part, in_short_rows, local_of, owners, part_of, spans
from cairn.checkpoint.peers import Peers
from cairn.errors import CairnError, InputError

if TYPE_CHECKING:
    import torch

_STAGING = ".writing-"
_own = threading.local()


class Writer:
    """One checkpoint being written. Leaving the context without `publish` removes every trace of it."""

    def __init__(self, path: str | Path, peers: Peers | None = None) -> None:
        """Begin under a hidden name beside `path`. Raises `InputError` if `path` exists: nothing is ever overwritten."""
        self.path, self._peers = Path(path), peers or Peers()
        self._files: dict[str, _OpenFile] = {}
        self._places: dict[tuple[str, str], tuple[_OpenFile, int, int]] = {}
        self._specs: dict[tuple[str, str], TensorSpec] = {}
        self._small: dict[str, FileEntry] = {}
        self._pool = ThreadPoolExecutor(max_workers=max(1, min(8, os.cpu_count() or 1)), thread_name_prefix="cairn-write")
        self._staging = self._peers.together(self._stage)[0] or self.path

    def _stage(self) -> Path | None:
        if not self._peers.first:
            return None
        if self.path.exists():
            raise InputError(f"{self.path} exists; a checkpoint is never overwritten, choose another name.")
        self._staging = self.path.parent / f"{_STAGING}{_owner()}-{uuid.uuid4().hex[:8]}-{self.path.name}"
        with self._explained():
            self._staging.mkdir(parents=True)
        return self._staging

    def declare(self, stem: str, specs: Iterable[TensorSpec], shard_bytes: int | None = None) -> None:
        """Lay out the tensors of `stem` ('model', 'optimizer', ...) and allocate their files, so that a full disk shows now."""
        layouts = layout.plan(specs, stem, shard_bytes)
        if self._peers.first:
            self._peers.together(lambda: self._open(stem, layouts))
        else:
            self._peers.together(lambda: None)  # the first one makes the files
            self._open(stem, layouts)
        if len(layouts) > 1:
            self.put_json(f"{stem}.safetensors.index.json", layout.index(layouts))

    def _open(self, stem: str, layouts: Sequence[FileLayout]) -> None:
        with self._explained():
            for plan in layouts:
                file = _OpenFile(self._staging / plan.filename, plan, self._pool, create=self._peers.first)
                self._files[plan.filename] = file
                for spec in plan.specs:
                    self._places[stem, spec.name] = (file, *plan.ranges[spec.name])
                    self._specs[stem, spec.name] = spec
                if self._peers.first:
                    file.write(0, memoryview(plan.header))

    def put(self, stem: str, name: str, tensor: torch.Tensor) -> None:
        """Write a whole tensor, whose dtype and shape are those declared, to its place."""
        self.put_bytes(stem, name, 0, as_bytes(tensor))

    def put_bytes(self, stem: str, name: str, offset: int, data: memoryview) -> None:
        """Write `data` at `offset` bytes into a tensor. Ranges may come in any order and from any thread, each exactly once."""
        file, begin, end = self._places[stem, name]
        if offset < 0 or begin + offset + len(data) > end:
            raise ValueError(f"{len(data)} bytes at {offset} do not fit tensor '{name}' of {end - begin} bytes")
        with self._explained():
            file.write(begin + offset, data)

    def put_part(self, stem: str, part: Part, tensor: torch.Tensor) -> None:
        """Write a part of a tensor; `tensor` has the declared dtype and the shape of the part."""
        self.put_part_bytes(stem, part, as_bytes(tensor))

    def put_part_bytes(self, stem: str, part: Part, data: memoryview) -> None:
        """The same from the part's bytes in C order."""
        spec, (file, begin, _) = self._specs[stem, part.name], self._places[stem, part.name]
        item = layout.ITEM_BYTES[spec.dtype]
        if len(data) != part.count * item:
            raise ValueError(f"{len(data)} bytes do not fill {part}")
        with self._explained():
            if in_short_rows(spec.shape, part, item):
                first = begin + (part.offset[0] * spec.shape[1] + part.offset[1]) * item
                file.write_rows(first, part.shape[0], part.shape[1] * item, spec.shape[1] * item, data)
            else:
                for span in spans(spec.shape, part):
                    file.write(begin + span.outer * item, data[span.inner * item : (span.inner + span.items) * item])

    def put_all(self, groups: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Write everything that was declared, each process its share of what the processes hold between them."""
        shares = self.shares(groups)

        def put() -> None:
            for stem, mine in shares.items():
                for part in mine:
                    self.put_part(stem, part, local_of(groups[stem][part.name]))

        self._peers.together(put)

    def shares(self, groups: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, list[Part]]:
        """The parts that this process is to write, by stem."""
        held = self._peers.gather({stem: [part_of(name, tensor) for name, tensor in tensors.items()] for stem, tensors in groups.items()})
        found = {}
        for stem, tensors in groups.items():
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            found[stem] = owners([process[stem] for process in held], shapes)[self._peers.rank]
        return found

    def put_json(self, filename: str, document: Any) -> None:
        """Write a small JSON file."""
        self.put_file(filename, json_bytes(document))

    def put_file(self, filename: str, data: bytes) -> None:
        """Write a small file whole; of several processes the first does."""
        if not plain_name(filename):
            raise ValueError(f"'{filename}' is not a plain file name")
        if not self._peers.first:
            return
        with self._explained():
            _write_whole(self._staging / filename, data)
        self._small[filename] = entry_of(data)

    def publish(self, lineage: Lineage) -> read.Checkpoint:
        """Flush, write the manifest last, and make the checkpoint visible under its name."""
        self.put_json(LINEAGE, lineage.model_dump(mode="json"))
        # What one process alone has completed it has digested; blocks that several wrote to are shared out once all have written.
        written = self._peers.gather({name: file.unfinished() for name, file in self._files.items()})
        parts = self._peers.together(lambda: self._digest(written))
        self._peers.together(lambda: self._show(parts) if self._peers.first else None)
        self._close()
        return read.open(self.path)

    def _digest(self, written: list[dict[str, list[int]]]) -> dict[str, dict[int, str]]:
        """Flush, and digest this process's share; returns the digests that it knows, by file and block."""
        found: dict[str, dict[int, str]] = {}
        with self._explained():
            for name, file in self._files.items():
                open_blocks = file.left_open([process[name] for process in written])
                found[name] = file.finish(open_blocks[self._peers.rank :: self._peers.size])
        return found

    def _show(self, parts: list[dict[str, dict[int, str]]]) -> None:
        entries = {}
        for name, file in self._files.items():
            digests = {block: digest for part in parts for block, digest in part[name].items()}
            entries[name] = FileEntry(size=file.size, blocks=[digests[block] for block in range(file.blocks)])
        with self._explained():
            _write_whole(self._staging / MANIFEST, Manifest.of(entries | self._small).dump())
            _sync_directory(self._staging)
            if self.path.exists():
                raise InputError(f"{self.path} appeared while it was being written; a checkpoint is never overwritten.")
            os.rename(self._staging, self.path)
            _sync_directory(self.path.parent)

    def abort(self) -> None:
        """Remove every trace."""
        self._close()
        if self._peers.first and self._staging != self.path:
            shutil.rmtree(self._staging, ignore_errors=True)

    def _close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for file in self._files.values():
            file.close()
        self._files, self._places = {}, {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abort()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the operating system's refusals into one plain sentence, with nothing left behind."""
        try:
            yield
        except OSError as error:
            self.abort()
            reasons = {
                errno.ENOSPC: "the disk is full",
                errno.EDQUOT: "the disk quota is used up",
                errno.EFBIG: "the file would be too large for the system's limit",
            }
            reason = reasons.get(error.errno or 0, error.strerror or str(error))
            raise InputError(f"{self.path} was not written: {reason}. Nothing was left behind; free some space or choose another place.") from error


class _OpenFile:
    """A file of known layout: takes byte ranges from any thread, digests each block as soon as it is complete."""

    def __init__(self, path: Path, plan: FileLayout, pool: ThreadPoolExecutor, *, create: bool) -> None:
        self.size, self._path, self._pool = plan.size, path, pool
        self._fd = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0), 0o644)
        if create:
            _allocate(self._fd, plan.size)
        self.blocks = -(-plan.size // BLOCK_BYTES)
        self._missing = [min(BLOCK_BYTES, plan.size - i * BLOCK_BYTES) for i in range(self.blocks)]
        self._digests: list[Future[str] | None] = [None] * self.blocks
        self._lock = threading.Lock()
        self._mapped: mmap.mmap | None = None

    def write(self, begin: int, data: memoryview) -> None:
        position, end = begin, begin + len(data)
        while position < end:
            # A write ends at a block's end, so that a block is digested while its bytes are still in the cache.
            stop = min(end, (position // BLOCK_BYTES + 1) * BLOCK_BYTES)
            written = os.pwrite(self._fd, data[position - begin : stop - begin], position)
            self._arrived(position // BLOCK_BYTES, written)
            position += written

    def write_rows(self, first: int, rows: int, width: int, distance: int, data: memoryview) -> None:
        """Write `rows` runs of `width` bytes, the first at `first`, each `distance` bytes after the one before."""
        import numpy as np

        if not rows or not width:
            return
        with self._lock:
            if self._mapped is None:
                self._mapped = mmap.mmap(self._fd, self.size)
        target = np.ndarray((rows, width), np.uint8, self._mapped, offset=first, strides=(distance, 1))
        target[...] = np.frombuffer(data, np.uint8).reshape(rows, width)

        def below(position: int) -> int:
            """Bytes of these runs that lie before a position."""
            whole, rest = divmod(max(0, position - first), distance)
            return min(whole, rows) * width + (min(rest, width) if whole < rows else 0)

        last = first + (rows - 1) * distance + width
        for block in range(first // BLOCK_BYTES, (last - 1) // BLOCK_BYTES + 1):
            count = below((block + 1) * BLOCK_BYTES) - below(block * BLOCK_BYTES)
            if count:
                self._arrived(block, count)

    def _arrived(self, block: int, count: int) -> None:
        with self._lock:
            self._missing[block] -= count
            complete = self._missing[block] == 0
        if complete:
            self._digests[block] = self._pool.submit(self._digest, block)

    def _digest(self, block: int) -> str:
        begin = block * BLOCK_BYTES
        # Read back from the page cache into the thread's own buffer: a mapping of the file would count as this process's
        # memory, all of it, and a fresh buffer for each block lets the allocator's free space grow.
        buffer = _buffer()[: min(BLOCK_BYTES, self.size - begin)]
        count = os.preadv(self._fd, [buffer], begin)
        if count != len(buffer):
            raise CairnError(f"{self._path.name}: only {count} of {len(buffer)} bytes could be read back at {begin}.")
        return block_digest(buffer)

    def unfinished(self) -> list[int]:
        """Of each block, how many bytes this process has not written."""
        return list(self._missing)

    def left_open(self, missing: Sequence[list[int]]) -> list[int]:
        """The blocks that no process completed alone. Raises `CairnError` unless every byte was written exactly once."""
        sizes = [min(BLOCK_BYTES, self.size - i * BLOCK_BYTES) for i in range(self.blocks)]
        written = [sum(size - process[block] for process in missing) for block, size in enumerate(sizes)]
        wrong = sum(abs(size - count) for size, count in zip(sizes, written, strict=True))
        if wrong:
            raise CairnError(f"{self._path.name}: {wrong} bytes were not written exactly once.")
        return [block for block in range(self.blocks) if all(process[block] for process in missing)]

    def finish(self, also: Sequence[int]) -> dict[int, str]:
        """Flush to disk; the digests of the blocks completed here and of those in `also`."""
        for block in also:
            self._digests[block] = self._pool.submit(self._digest, block)
        os.fsync(self._fd)
        return {block: future.result() for block, future in enumerate(self._digests) if future is not None}

    def close(self) -> None:
        if self._mapped is not None:
            self._mapped.close()
        os.close(self._fd)


def save(
    path: str | Path,
    *,
    model: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    lineage: Lineage,
    tokenizer: Any = None,
    generation: Mapping[str, Any] | None = None,
    optimizer: Mapping[str, torch.Tensor] | None = None,
    ingredients: Mapping[str, torch.Tensor] | None = None,
    trainer: Mapping[str, Any] | None = None,
    shard_bytes: int | None = None,
    peers: Peers | None = None,
) -> read.Checkpoint:
    """Write a whole checkpoint from tensors in memory and return it opened.

    `tokenizer` is anything with `files() -> {name: bytes}`; `trainer` makes trainer.json; files of tensors larger than
    `shard_bytes` are split. Where `peers` are several processes, all of them call this with the same names; tensors may be
    DTensors in any layout, or the same plain tensor everywhere, and what they write does not depend on how many they are.
    Raises `InputError` if `path` exists or the disk is full; nothing is left behind then.
    """
    groups = {stem: tensors for stem, tensors in (("model", model), ("optimizer", optimizer), ("ingredients", ingredients)) if tensors}
    with Writer(path, peers) as writer:
        writer.put_json("config.json", dict(config))
        if generation is not None:
            writer.put_json("generation_config.json", dict(generation))
        for name, data in (tokenizer.files() if tokenizer is not None else {}).items():
            writer.put_file(name, data)
        if trainer is not None:
            writer.put_json("trainer.json", dict(trainer))
        for stem, tensors in groups.items():
            writer.declare(stem, [spec_of(name, tensor) for name, tensor in tensors.items()], shard_bytes)
        writer.put_all(groups)
        return writer.publish(lineage)


def json_bytes(document: Any) -> bytes:
    """A small document as it stands in a checkpoint."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """The spec of a tensor."""
    from cairn.checkpoint.dtypes import CODES

    return TensorSpec(name, CODES[tensor.dtype], tuple(tensor.shape))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes in C order, without a copy where it already lies so in host memory."""
    import torch

    flat = tensor.detach().contiguous().cpu().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)


def sweep(directory: str | Path) -> list[Path]:
    """Remove what writers that no longer live left in `directory`; a living one's staging is never touched."""
    removed = []
    for path in Path(directory).glob(f"{_STAGING}*"):
        host, pid, started, *_ = path.name.removeprefix(_STAGING).split("-", 3)
        if host == _host() and started != _started(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    for path in Path(directory).glob(".old-*"):
        shutil.rmtree(path, ignore_errors=True)
        removed.append(path)
    return removed


def _owner() -> str:
    return f"{_host()}-{os.getpid()}-{_started(os.getpid())}"


def _host() -> str:
    return socket.gethostname().replace("-", "_")


def _started(pid: int) -> str:
    """When a process started, as the kernel counts; '0' where that can not be told, 'gone' if there is no such process.

    A process number is used again after a reboot or a long time: number and start together are unique.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return "gone"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except PermissionError:
        return "0"
    return "0"


def _buffer() -> memoryview:
    """A block of memory that belongs to the calling thread."""
    if not hasattr(_own, "buffer"):
        _own.buffer = memoryview(bytearray(BLOCK_BYTES))
    return _own.buffer


def _allocate(fd: int, size: int) -> None:
    """Reserve the bytes now, where the file system can; otherwise only set the size."""
    os.ftruncate(fd, size)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise


def _write_whole(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
