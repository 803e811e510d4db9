"""Whether bytes are what was written: of a whole checkpoint, block by block, or of what is read, as it is read."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from cairn.checkpoint.format import documents
from cairn.checkpoint.format.canonical import in_files, weights_entry
from cairn.checkpoint.format.fragments import INDEX, StoredFile, load_index
from cairn.checkpoint.format.layout import FileLayout, read_layout
from cairn.checkpoint.format.manifest import MANIFEST, Damage, Manifest
from cairn.checkpoint.format.place import is_store
from cairn.errors import CairnError, DamagedError

_own = threading.local()
_STRIPES = 16


class SoundBlocks:
    """Which blocks of one file are known to be what was written.

    A block that lies whole in what was just read is digested there, while it is in the cache; of any other the rest is read, too.
    """

    def __init__(self, path: Path, digests: Sequence[str], block_size: int, size: int, fill: Callable[[memoryview, int], None]) -> None:
        self._path, self._digests, self._block_size, self._size, self._fill = path, digests, block_size, size, fill
        self._known = bytearray(len(digests))
        self._locks = [threading.Lock() for _ in range(_STRIPES)]

    def check(self, data: memoryview, position: int) -> None:
        """`data` was read from `position` on. Raises `DamagedError` if a block that it touches is not what was written."""
        if not len(data):
            return
        for block in range(position // self._block_size, (position + len(data) - 1) // self._block_size + 1):
            if not self._known[block]:
                # Several threads read pieces of one block: the first digests it, the others wait that moment.
                with self._locks[block % _STRIPES]:
                    if not self._known[block]:
                        self._check(block, data, position)

    def _check(self, block: int, data: memoryview, position: int) -> None:
        begin = block * self._block_size
        end = min(begin + self._block_size, self._size)
        if position <= begin and end <= position + len(data):
            whole = data[begin - position : end - position]
        else:
            whole = _buffer(self._block_size)[: end - begin]
            self._fill(whole, begin)
        if blake3(whole).hexdigest() != self._digests[block]:
            raise DamagedError(
                f"{self._path} is damaged: bytes {begin} to {end} are not what was written. `cairn verify {self._path.parent}` names the tensors in them."
            )
        self._known[block] = 1


def _buffer(size: int) -> memoryview:
    """Memory of the calling thread, used again for each block."""
    if getattr(_own, "size", 0) < size:
        _own.buffer, _own.size = memoryview(bytearray(size)), size
    return _own.buffer


# -- a whole checkpoint -------------------------------------------------------------------------------------------


@dataclass
class VerifyReport:
    """What a verification found in one checkpoint."""

    path: Path
    digest: str | None = None
    bytes: int = 0
    damage: list[Damage] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not self.damage


def check(path: Path, progress: Callable[[int], object] | None = None, share: tuple[int, int] = (0, 1)) -> VerifyReport:
    """Read every byte of the checkpoint in the directory `path` and compare it with the manifest; damage is reported, not raised.

    `progress` is told the bytes read so far. Of several processes each takes its `share`, (rank, number of processes), of the blocks.
    """
    report = VerifyReport(path)
    try:
        manifest = Manifest.load(path)
    except DamagedError as error:
        report.damage.append(Damage(MANIFEST, str(error)))
        return report
    report.digest = manifest.digest
    report.damage = manifest.check_sizes(path)
    unsound = {damage.file for damage in report.damage}
    stored: Mapping[str, StoredFile] = {}
    if manifest.fragments and not unsound:
        try:
            stored = load_index(path, manifest)
        except DamagedError as error:
            report.damage.append(Damage(INDEX, str(error)))
    if not share[0] and not report.damage:
        report.damage += _not_as_cut(path, manifest, stored)
    for name, entry in manifest.files.items():
        try:
            if name in stored:
                report.damage += manifest.check_file(name, _stored_block(stored[name], entry.size, manifest.block_size), stored[name].layout.ranges, share)
            elif name not in unsound and not manifest.in_fragments(name):
                with _opened(path / name, manifest.block_size) as block:
                    report.damage += manifest.check_file(name, block, _ranges(path / name), share)
        except (DamagedError, OSError) as error:
            report.damage.append(Damage(name, f"cannot be read: {error}"))
        report.bytes += entry.size
        if progress is not None:
            progress(report.bytes)
    return report


def _not_as_cut(path: Path, manifest: Manifest, stored: Mapping[str, StoredFile]) -> list[Damage]:
    """Whether numbered files hold the tensors of the one file that the manifest says they would fill, which is what identifies the model."""
    found = []
    for name, entry in manifest.uncut.items():
        with contextlib.ExitStack() as opened:
            try:
                files = [(stored[part].layout, stored[part].fill) if part in stored else _filled(path / part, opened) for part in manifest.cut_into(name)]
                if weights_entry(in_files(files), name.removesuffix(".safetensors")) != entry:
                    found.append(Damage(MANIFEST, f"what it says of the tensors of {name} as one file is not what lies in the numbered files"))
            except (CairnError, OSError) as error:
                found.append(Damage(name, f"cannot be read from its numbered files: {error}"))
    return found


def _filled(path: Path, opened: contextlib.ExitStack) -> tuple[FileLayout, Callable[[memoryview, int], object]]:
    """The layout of a file, and what fills a buffer with its bytes from a position on."""
    file = opened.enter_context(path.open("rb") if is_store(path) else os.fdopen(documents.open_file(path), "rb"))

    def fill(target: memoryview, begin: int) -> None:
        file.seek(begin)
        if file.readinto(target) != len(target):  # type: ignore[attr-defined]
            raise DamagedError(f"{path} is cut short")

    return read_layout(path), fill


def newest_sound(paths: Sequence[Path]) -> Path | None:
    """The last of these checkpoints in which every byte is what was written."""
    return next((path for path in reversed(paths) if check(path).sound), None)


@contextlib.contextmanager
def _opened(path: Path, size: int) -> Iterator[Callable[[int], bytes]]:
    """The blocks of a file, by number."""
    with path.open("rb") if is_store(path) else os.fdopen(documents.open_file(path), "rb", buffering=0) as file:

        def block(number: int) -> bytes:
            file.seek(number * size)
            return file.read(size)

        yield block


def _stored_block(file: StoredFile, total: int, size: int) -> Callable[[int], bytes]:
    return lambda number: file.read(number * size, min((number + 1) * size, total))


def _ranges(path: Path) -> Mapping[str, tuple[int, int]]:
    """The bytes that each tensor fills; empty where the damage is in the header itself."""
    try:
        return read_layout(path).ranges if path.suffix == ".safetensors" else {}
    except DamagedError:
        return {}
