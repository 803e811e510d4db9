"""Compressing a checkpoint by name: what `cairn compress` calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cairn.device import computes

if TYPE_CHECKING:
    from cairn.checkpoint.format.read import Checkpoint


@computes
def compress(
    method: str,
    checkpoint: str | Path | Checkpoint,
    out: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    device: str | None = None,
    allow_non_finite: bool = False,
    say: Callable[[str], object] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Checkpoint:
    """Make a sparser or smaller checkpoint by the compression `method`.

    The model is taken block by block: in memory are the weights of one block and what a budget allows of the texts' hidden states. The same
    call after a kill goes on with the block at which it stood.

    Parameters
    ----------
    method
        A name of `cairn catalog compression`.
    checkpoint
        A checkpoint, a run, or a transformers directory of any causal language model.
    out
        Where the new checkpoint goes; nothing may be there.
    options
        The method's options; `calibration` says which texts it sees.
    device
        Where blocks are computed; default: the accelerator if there is one.
    allow_non_finite
        Write values that are not finite; by default they are refused by name.
    say
        Told a line about each block.
    progress
        Told (bytes done, bytes in all) while the result is written.

    Returns
    -------
    The new checkpoint. Its lineage holds the digest of the calibration set.

    Raises
    ------
    NotFoundError
        For an unknown method or corpus.
    InputError, MismatchError
        Before anything is written, for options, texts and models that do not fit.

    Examples
    --------
    >>> cairn.compress("wanda", "runs/a", "sparse", {"calibration": "python-docs", "sparsity": 0.5})  # doctest: +SKIP
    """
    from cairn.checkpoint.operating.stream import apply
    from cairn.options import configure

    operation = configure("compression", {"name": method, **(options or {})})
    return apply(operation, [checkpoint], out, device=device, allow_non_finite=allow_non_finite, say=say, progress=progress)
