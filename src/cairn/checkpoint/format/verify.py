"""Verification: every block of every file against the manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cairn.checkpoint.format import read
from cairn.checkpoint.format.fragments import INDEX, StoredFile, load_index
from cairn.checkpoint.format.layout import read_layout
from cairn.checkpoint.format.manifest import MANIFEST, Damage, Manifest
from cairn.checkpoint.format.place import place
from cairn.errors import DamagedError, NotFoundError


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


def verify(path: str | Path, progress: Callable[[int], object] | None = None) -> VerifyReport:
    """Read every byte of the checkpoint (or of a run's newest) and compare it with its manifest.

    `progress` is told the bytes read so far, file by file. Damage is reported, not raised; `NotFoundError` only if there is nothing to verify.
    """
    path = place(path)
    if path.is_dir() and not (path / MANIFEST).exists() and read.is_run(path):
        complete = read.list_checkpoints(path)
        if not complete:
            raise NotFoundError(f"The run {path} has no complete checkpoint yet.")
        path = complete[-1]
    if not path.is_dir():
        raise NotFoundError(f"There is no checkpoint at {path}.")
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
    for name, entry in manifest.files.items():
        if name in stored:
            report.damage += manifest.check_file(name, _stored_blocks(stored[name], entry.size, manifest.block_size), stored[name].layout.ranges)
        elif name not in unsound and not manifest.in_fragments(name):
            report.damage += manifest.check_file(name, _blocks(path / name, len(entry.blocks), manifest.block_size), _ranges(path / name))
        report.bytes += entry.size
        if progress is not None:
            progress(report.bytes)
    return report


def _blocks(path: Path, count: int, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        for _ in range(count):
            yield file.read(size)


def _stored_blocks(file: StoredFile, total: int, size: int) -> Iterator[bytes]:
    for begin in range(0, total, size):
        yield file.read(begin, min(begin + size, total))


def _ranges(path: Path) -> Mapping[str, tuple[int, int]]:
    """The bytes that each tensor fills; empty where the damage is in the header itself."""
    try:
        return read_layout(path).ranges if path.suffix == ".safetensors" else {}
    except DamagedError:
        return {}
