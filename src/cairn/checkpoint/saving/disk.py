"""Writing on a file system: staged under a hidden name, every byte range in its place at once, shown by one rename."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cairn.checkpoint.format import blocks
from cairn.checkpoint.format.blocks import Rows
from cairn.checkpoint.format.layout import ITEM_BYTES, FileLayout, TensorSpec
from cairn.checkpoint.format.manifest import BLOCK_BYTES, MANIFEST, FileEntry, Manifest, block_digest
from cairn.checkpoint.format.parts import Part, in_short_rows, spans
from cairn.errors import CairnError, InputError

_STAGING = ".writing-"
_own = threading.local()


class Directory:
    """A directory that one or several processes fill under a hidden name beside its own."""

    def __init__(self, path: Path) -> None:
        self.path = self._staging = path
        self._first = True

    def begin(self) -> str:
        """Make the hidden directory; returns what the others need to join. Raises `InputError` if the name is taken."""
        if self.path.exists():
            raise InputError(f"{self.path} exists; a checkpoint is never overwritten, choose another name.")
        self._staging = staging_beside(self.path)
        self._staging.mkdir(parents=True)
        sweep_staging(self.path.parent)
        return str(self._staging)

    def join(self, token: str, rank: int) -> None:
        """Take part in what the first process has begun."""
        self._staging, self._first = Path(token), rank == 0

    def open(self, plan: FileLayout, pool: Executor, *, create: bool) -> OpenFile:
        """A file of safetensors; the process that creates it also writes its header."""
        return OpenFile(self._staging / plan.filename, plan, pool, create=create)

    def put(self, filename: str, data: bytes) -> None:
        """Write a small file whole."""
        _write_whole(self._staging / filename, data)

    def show(
        self,
        entries: Mapping[str, FileEntry],
        files: Mapping[str, OpenFile],
        told: Sequence[Mapping[str, Told]],
        uncut: Mapping[str, FileEntry],
    ) -> None:
        """Write the manifest and give the directory its name."""
        _write_whole(self._staging / MANIFEST, Manifest.of(dict(entries), uncut=dict(uncut)).dump())
        _sync_directory(self._staging)
        if self.path.exists():
            raise InputError(f"{self.path} appeared while it was being written; a checkpoint is never overwritten.")
        os.rename(self._staging, self.path)
        _sync_directory(self.path.parent)

    def abort(self) -> None:
        """Remove what was written; of several processes the first does."""
        if self._first and self._staging != self.path:
            shutil.rmtree(self._staging, ignore_errors=True)


class Here(Executor):
    """An executor that does what it is given at once, in the calling thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def workers(processes: int, *, busy: bool = False) -> Executor:
    """What digests blocks: a thread for each core that the processes of this machine leave over, or the process itself.

    Where every core has a process of its own, or is `busy` otherwise, handing blocks to threads would only make them wait for each other.
    """
    if busy:
        return Here()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    cores = (os.cpu_count() or 1) // max(1, here)
    return ThreadPoolExecutor(min(8, cores), thread_name_prefix="cairn-write") if cores > 1 else Here()


Told = list[int]
"""What a process tells the others of a file: of each block, how many bytes it has not written."""


class OpenFile:
    """A file of known layout: takes byte ranges from any thread, digests each block as soon as it is complete."""

    def __init__(self, path: Path, plan: FileLayout, pool: Executor, *, create: bool) -> None:
        self.size, self._plan, self._path, self._pool = plan.size, plan, path, pool
        self._fd = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0), 0o644)
        if create:
            _allocate(self._fd, plan.size)
        self._missing = blocks.sizes(plan.size)
        self._digests: list[Future[str] | None] = [None] * len(self._missing)
        # Bytes in hand are digested as they are, but only at once: their owner may change them when this returns.
        self._running: dict[int, blocks.Running] | None = {} if isinstance(pool, Here) else None
        self._lock = threading.Lock()
        self._mapped: mmap.mmap | None = None
        if create:
            self.write(0, memoryview(plan.header))

    def put_bytes(self, spec: TensorSpec, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor, from `offset` bytes into it."""
        self.write(self._plan.ranges[spec.name][0] + offset, data)

    def put_part(self, spec: TensorSpec, part: Part, data: memoryview) -> None:
        """Write a part of a tensor."""
        begin, item = self._plan.ranges[spec.name][0], ITEM_BYTES[spec.dtype]
        if in_short_rows(spec.shape, part, item):
            first = begin + (part.offset[0] * spec.shape[1] + part.offset[1]) * item
            self.write_rows(Rows(first, part.shape[0], part.shape[1] * item, spec.shape[1] * item), data)
        else:
            for span in spans(spec.shape, part):
                self.write(begin + span.outer * item, data[span.inner * item : (span.inner + span.items) * item])

    def write(self, begin: int, data: memoryview) -> None:
        position, end = begin, begin + len(data)
        while position < end:
            # A write ends at a block's end, so that a block is digested while its bytes are still in the cache.
            stop = min(end, (position // BLOCK_BYTES + 1) * BLOCK_BYTES)
            written = os.pwrite(self._fd, data[position - begin : stop - begin], position)
            self._arrived(*divmod(position, BLOCK_BYTES), data[position - begin : position - begin + written])
            position += written

    def write_rows(self, rows: Rows, data: memoryview) -> None:
        import numpy as np

        if not rows.runs or not rows.width:
            return
        with self._lock:
            if self._mapped is None:
                self._mapped = mmap.mmap(self._fd, self.size)
        target = np.ndarray((rows.runs, rows.width), np.uint8, self._mapped, offset=rows.first, strides=(rows.distance, 1))
        target[...] = np.frombuffer(data, np.uint8).reshape(rows.runs, rows.width)
        for block, count in rows.by_block():
            self._arrived(block, 0, None, count)

    def _arrived(self, block: int, offset: int, data: memoryview | None, count: int = 0) -> None:
        """Count bytes of a block, and digest it once it is complete: `data` at `offset` of it, or `count` bytes that came in several runs."""
        with self._lock:
            self._missing[block] -= count if data is None else len(data)
            complete = self._missing[block] == 0
            if self._running is None:
                known = None
            else:
                running = self._running.setdefault(block, blocks.Running())
                running.take(offset, data)
                known = self._running.pop(block).digest() if complete else None
        if complete:
            self._digests[block] = self._pool.submit(self._digest, block, known)

    def _size_of(self, block: int) -> int:
        return min(BLOCK_BYTES, self.size - block * BLOCK_BYTES)

    def _digest(self, block: int, known: str | None = None) -> str:
        begin, size = block * BLOCK_BYTES, self._size_of(block)
        if known is None:
            # Read back from the page cache into the thread's own buffer: a mapping of the file would count as this process's
            # memory, all of it, and a fresh buffer for each block lets the allocator's free space grow.
            data = _buffer()[:size]
            count = os.preadv(self._fd, [data], begin)
            if count != size:
                raise CairnError(f"{self._path.name}: only {count} of {size} bytes could be read back at {begin}.")
            known = block_digest(data)
        _start_flushing(self._fd, begin, size)
        return known

    def told(self) -> Told:
        """What the others must know before blocks that several wrote to are digested."""
        return list(self._missing)

    def left_open(self, told: Sequence[Told]) -> list[int]:
        """The blocks that no process completed alone. Raises `CairnError` unless every byte was written exactly once."""
        return blocks.left_open(self._path.name, self.size, told)

    def finish(self, also: Sequence[int], told: Sequence[Told]) -> dict[int, str]:
        """Flush to disk; the digests of the blocks completed here and of those in `also`."""
        for block in also:
            self._digests[block] = self._pool.submit(self._digest, block)
        os.fsync(self._fd)
        return {block: future.result() for block, future in enumerate(self._digests) if future is not None}

    def written(self, told: Sequence[Told]) -> Callable[[memoryview, int], None]:
        """Fills a buffer with what was written, from a position on."""

        def fill(target: memoryview, begin: int) -> None:
            done = 0
            while done < len(target):
                count = os.preadv(self._fd, [target[done:]], begin + done)
                if not count:
                    raise CairnError(f"{self._path.name}: it ends at {begin + done}, before what was written there.")
                done += count

        return fill

    def close(self) -> None:
        if self._mapped is not None:
            self._mapped.close()
        os.close(self._fd)


def staging_beside(path: Path) -> Path:
    """A hidden name beside a place, under which this process may write; it tells others who writes there."""
    return path.parent / f"{_STAGING}{_owner()}-{uuid.uuid4().hex[:8]}-{path.name}"


def sweep(directory: str | Path) -> list[Path]:
    """Remove what writers that no longer live left in the folder of a run's checkpoints, and checkpoints that were being removed."""
    removed = sweep_staging(directory)
    for path in Path(directory).glob(".old-*"):
        shutil.rmtree(path, ignore_errors=True)
        removed.append(path)
    return removed


def sweep_staging(directory: str | Path) -> list[Path]:
    """Remove what writers that no longer live left in any folder; a living one's staging is never touched."""
    removed = []
    for path in left_behind(directory):
        shutil.rmtree(path, ignore_errors=True)
        removed.append(path)
    return removed


def left_behind(directory: str | Path) -> list[Path]:
    """The staging of writers on this machine that no longer live."""
    found = []
    for path in Path(directory).glob(f"{_STAGING}*"):
        host, pid, started = (*path.name.removeprefix(_STAGING).split("-", 3), "", "", "")[:3]
        if host == _host() and pid.isdigit() and started != _started(int(pid)):
            found.append(path)
    return found


def _owner() -> str:
    return f"{_host()}-{os.getpid()}-{_started(os.getpid())}"


def _host() -> str:
    return socket.gethostname().replace("-", "_")


def _started(pid: int) -> str:
    """When a process started, as the kernel counts; '0' where that cannot be told, 'gone' if there is no such process.

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


def _start_flushing(fd: int, begin: int, count: int) -> None:
    """Let the system begin to write these bytes to the disk, so that it works while further bytes are copied and digested."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, begin, count, os.POSIX_FADV_DONTNEED)  # pages that are not yet written stay until they are


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
