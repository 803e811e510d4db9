"""Verification: every block of every file against the manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cairn.checkpoint import read
from cairn.checkpoint.manifest import MANIFEST, Damage, Manifest
from cairn.errors import DamagedError, NotFoundError


@dataclass
class Report:
    """What a verification found in one checkpoint."""

    path: Path
    digest: str | None = None
    bytes: int = 0
    damage: list[Damage] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not self.damage


def verify(path: str | Path, progress: Callable[[int], object] | None = None) -> Report:
    """Read every byte of the checkpoint (or of a run's newest) and compare it with its manifest.

    `progress` is told the bytes read so far, file by file. Damage is reported, not raised; `NotFoundError` only if there is nothing to verify.
    """
    path = Path(path)
    if path.is_dir() and not (path / MANIFEST).exists() and (path / "checkpoints").is_dir():
        complete = read.list_checkpoints(path)
        if not complete:
            raise NotFoundError(f"The run {path} has no complete checkpoint yet.")
        path = complete[-1]
    if not path.is_dir():
        raise NotFoundError(f"There is no checkpoint at {path}.")
    report = Report(path)
    try:
        manifest = Manifest.load(path)
    except DamagedError as error:
        report.damage.append(Damage(MANIFEST, str(error)))
        return report
    report.digest = manifest.digest
    report.damage = manifest.check_sizes(path)
    unsized = {damage.file for damage in report.damage}
    for name, entry in manifest.files.items():
        if name not in unsized:
            report.damage += manifest.check_file(path, name)
        report.bytes += entry.size
        if progress is not None:
            progress(report.bytes)
    return report
