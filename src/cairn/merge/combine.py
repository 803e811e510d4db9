"""Combining checkpoints by name: what `cairn merge` and `cairn average` call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cairn.checkpoint.read import Checkpoint


def merge(
    method: str,
    checkpoints: Sequence[str | Path | Checkpoint],
    out: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    progress: Callable[[int, int], object] | None = None,
) -> Checkpoint:
    """Combine checkpoints by the operation `method` with its `options` into the new checkpoint `out`; streams.

    Raises `NotFoundError` for an unknown method and `InputError` or `MismatchError` before anything is written.
    """
    from cairn.checkpoint.stream import apply
    from cairn.options import configure

    return apply(configure("operation", {"name": method, **(options or {})}), checkpoints, out, progress=progress)


def average(
    checkpoints: Sequence[str | Path | Checkpoint],
    out: str | Path,
    *,
    last: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Checkpoint:
    """Uniform mean of checkpoints; of the `last` checkpoints of a run when one run is named."""
    from cairn.checkpoint import read
    from cairn.errors import InputError

    sources = list(checkpoints)
    if last is not None:
        if len(sources) != 1 or not isinstance(sources[0], (str, Path)):
            raise InputError("last=N averages the newest checkpoints of one run; name that run alone.")
        inside = read.list_checkpoints(sources[0])
        if len(inside) < last or last < 1:
            raise InputError(f"The run {sources[0]} has {len(inside)} complete checkpoints; {last} can not be averaged.")
        sources = list(inside[-last:])
    return merge("average", sources, out, progress=progress)
