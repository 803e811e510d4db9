"""Fold adapters and tell what they are: what `cairn adapt` calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cairn.checkpoint.format import adapter as files
from cairn.checkpoint.format import read
from cairn.errors import CairnError, InputError

if TYPE_CHECKING:
    from cairn.checkpoint.format.read import Checkpoint


def fold(
    adapter: str | Path | Checkpoint,
    out: str | Path,
    *,
    base: str | Path | Checkpoint | None = None,
    dtype: str | None = None,
    shard_bytes: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Checkpoint:
    """Fold an adapter into its base and write the whole model to `out`; the base is read tensor by tensor.

    Names, tied weights, tokenizer, chat template and generation settings are those of the base.

    Parameters
    ----------
    adapter : an adapter checkpoint, a run that trains one (its newest), or a directory that PEFT has written.
    out : where the new checkpoint goes; must not exist.
    base : the checkpoint that the adapter was trained on; by default found where it was then, or beside the adapter. Its digest decides.
    dtype : float32, bfloat16, float16 or float64; by default that of the base.
    shard_bytes : split files larger than this.
    progress : is told (bytes done, bytes in all).

    Returns
    -------
    Checkpoint : the whole model, whose parents are the base and the adapter.

    Raises
    ------
    InputError : `adapter` is no adapter, or `out` exists.
    MismatchError : the base is another model than that on which the adapter was trained.
    NotFoundError : the base is not found.

    Example
    -------
    >>> cairn.fold("runs/poems", "poet")          # doctest: +SKIP
    >>> cairn.generate("poet", "Shall I")         # doctest: +SKIP

    Source: "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
    """
    from cairn.adaptation.methods.fold import Fold
    from cairn.checkpoint.operating.stream import apply

    opened = read.opened(adapter, base=base)
    _refuse_whole(opened)
    return apply(Fold(dtype=dtype), [opened.base, opened], out, shard_bytes=shard_bytes, progress=progress)


def adapter_summary(adapter: str | Path | Checkpoint) -> dict[str, Any]:
    """What an adapter is: its kind and options, its matrices with the size of each change, numbers, bytes on disk, and its base.

    Raises `InputError` where it is no adapter.
    """
    from cairn.adaptation.methods.fold import Changes
    from cairn.options import method_options

    opened = read.opened(adapter)
    _refuse_whole(opened)
    changes, folder = Changes(opened), opened.stored
    matrices: list[dict[str, Any]] = []
    for module, tensors in changes.modules.items():
        change = changes.change(module)
        matrices.append(
            {
                "matrix": module,
                "shape": [change.matrix.outputs, change.matrix.inputs],
                "numbers": sum(tensor.spec.nbytes // tensor.dtype.itemsize for tensor in tensors.values()),
                "norm": float(change.delta().norm()),
            }
        )
    numbers = sum(int(row["numbers"]) for row in matrices)
    return {
        "path": str(opened.path),
        "adapter": {key: value for key, value in method_options(changes.adapter).items() if key != "targets"},
        "base": {"model_digest": files.base_digest(opened), "found": _found(opened)},
        "numbers": numbers,
        "bytes": folder.nbytes,
        "matrices": matrices,
    }


def _found(adapter: Checkpoint) -> str | None:
    """Where the base lies, if it is still found."""
    try:
        return str(adapter.base.path)
    except CairnError:
        return None


def _refuse_whole(checkpoint: Checkpoint) -> None:
    if not checkpoint.is_adapter:
        raise InputError(f"{checkpoint.path} is a whole model, not an adapter (it has no {files.STEM}.safetensors).")
