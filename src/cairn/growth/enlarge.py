"""Growing checkpoints by name: what `cairn grow` calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cairn.device import computes

if TYPE_CHECKING:
    from cairn.checkpoint.format.read import Checkpoint


@computes
def grow(
    method: str,
    checkpoint: str | Path | Checkpoint,
    out: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    allow_non_finite: bool = False,
    device: Any = None,
    progress: Callable[[int, int], object] | None = None,
) -> Checkpoint:
    """Make a larger checkpoint by the growth `method` with its `options` at `out`; streams (`ligo` learns in memory first).

    The result has no moments. It keeps the parent's place in its data and its recipe, with the sizes of the large model:
    `cairn.fork(result, run, ["schedule.start=now", ...], fresh=["optimizer"])` trains it on. Raises `NotFoundError` for an
    unknown method, and for a `device` (where `ligo` learns, as `cairn.device.choose`) that is not there, `InputError` or `MismatchError` before anything is
    written.
    """
    from cairn.checkpoint.operating.stream import apply
    from cairn.options import configure

    return apply(
        configure("growth", {"name": method, **(options or {})}), [checkpoint], out, device=device, allow_non_finite=allow_non_finite, progress=progress
    )


def difference(small: str | Path | Checkpoint, large: str | Path | Checkpoint, tokens: int = 64, *, device: Any = None) -> float:
    """The greatest difference between the logits of two models on the same drawn tokens, in float32; both are loaded on `device`."""
    import torch

    from cairn.checkpoint.format import read
    from cairn.device import choose
    from cairn.randomness import bits, seed_for

    found, where = [], choose(device)
    for item in (small, large):
        opened = read.open(item) if isinstance(item, (str, Path)) else item
        ids = torch.from_numpy((bits(seed_for(0, "grow", "difference"), range(tokens)) % opened.config["vocab_size"]).astype("int64"))[None]
        with torch.no_grad():
            found.append(opened.model(dtype=torch.float32, device=where)(ids.to(where)).logits)
    return float((found[0] - found[1]).abs().max())
