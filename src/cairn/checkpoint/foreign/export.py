"""Export: a checkpoint for other programs, in any floating dtype: for transformers, or for torch.distributed.checkpoint; or a whole copy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from cairn.checkpoint.format import documents, read
from cairn.checkpoint.format.carried import luggage
from cairn.checkpoint.format.layout import TensorSpec
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.manifest import LINEAGE
from cairn.checkpoint.format.place import is_store, place
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.format.redundant import aliases
from cairn.checkpoint.operating import stream
from cairn.checkpoint.operating.values import refuse_non_finite
from cairn.checkpoint.saving.disk import staging_beside, sweep_staging
from cairn.checkpoint.saving.write import Writer, as_bytes
from cairn.errors import InputError

CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


class Export(stream.Operation):
    """The weights alone, cast to `dtype` if one is given."""

    dtype: str | None = None

    def copies(self) -> bool:
        return self.dtype is None

    def check(self, parents: Sequence[Checkpoint]) -> None:
        if self.dtype is not None and self.dtype not in CODES:
            raise InputError(f"dtype is one of {', '.join(CODES)}, not '{self.dtype}'.")

    def config(self, parents: Sequence[Checkpoint]) -> dict[str, Any]:
        config = dict(parents[0].config)
        return config if self.dtype is None else config | {key: self.dtype for key in ("dtype", "torch_dtype") if key in config}

    def outputs(self, parents: Sequence[Checkpoint]) -> list[TensorSpec]:
        specs = super().outputs(parents)
        if self.dtype is None:
            return specs
        return [TensorSpec(s.name, CODES[self.dtype] if s.dtype in CODES.values() else s.dtype, s.shape) for s in specs]

    def pieces(self, spec: TensorSpec, parents: Sequence[Checkpoint]) -> Iterator[torch.Tensor]:
        source = parents[0].tensors[spec.name]
        for begin, end in stream.piecewise(source.spec):
            yield source.flat(begin, end)


def export(
    checkpoint: str | Path | Checkpoint,
    out: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int | None = None,
    allow_non_finite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Checkpoint:
    """Write the weights, config and tokenizer of a checkpoint to `out`, a directory that transformers opens.

    Parameters
    ----------
    checkpoint
        A checkpoint or a run.
    out
        Where the directory goes; nothing may be there.
    dtype
        float32, bfloat16, float16 or float64; by default that of the stored weights.
    shard_bytes
        Files larger than this are split, with an index.
    allow_non_finite
        Write values that are not finite, or that the dtype makes infinite; by default they are refused by name.
    progress
        Told (bytes done, bytes in all).

    Returns
    -------
    The checkpoint at `out`.

    Raises
    ------
    InputError, MismatchError
        For an unknown dtype, a taken place, quantized weights that are to be cast, values that are not finite.

    Examples
    --------
    >>> cairn.export("runs/a", "released", dtype="bfloat16")  # doctest: +SKIP
    """
    return stream.apply(Export(dtype=dtype), [checkpoint], out, name="export", shard_bytes=shard_bytes, allow_non_finite=allow_non_finite, progress=progress)


def copy(checkpoint: str | Path | Checkpoint, out: str | Path, *, progress: Callable[[int, int], object] | None = None) -> Checkpoint:
    """Write a checkpoint once more at `out`, with its training state, its lineage and so its digest: from a store to a disk, or back.

    Raises `MismatchError` if what was read is not what the manifest says was written.
    """
    source = checkpoint if isinstance(checkpoint, Checkpoint) else read.open(checkpoint)
    folders = {
        stem: folder for stem, folder in ((source.stored.stem, source.stored), ("optimizer", source.optimizer), ("ingredients", source.ingredients)) if folder
    }
    total, done = sum(folder.nbytes for folder in folders.values()), 0
    laid_out = {layout.filename for folder in folders.values() for layout in folder.layouts}
    with Writer(out) as writer:
        for name in sorted(source.manifest.files):
            if name not in laid_out and name != LINEAGE:
                writer.put_file(name, source.read_file(name) or b"")
        for stem, folder in folders.items():
            writer.lay_out(stem, folder.layouts)
            for tensor in folder.values():
                item = tensor.dtype.itemsize
                for begin, end in stream.piecewise(tensor.spec):
                    writer.put_bytes(stem, tensor.name, begin * item, as_bytes(tensor.flat(begin, end)))
                done += tensor.nbytes
                if progress is not None:
                    progress(done, total)
        return writer.publish(source.lineage or Lineage.record("import", "copy"), expected=source.digest)


def export_dcp(
    checkpoint: str | Path | Checkpoint, out: str | Path, *, dtype: str | None = None, optimizer: bool = False, allow_non_finite: bool = False
) -> dict[str, Any]:
    """Write a folder that torch.distributed.checkpoint loads, with its own writer: `model.<name>` for the weights.

    A head that the model ties to its embedding stands there too, as in `model.state_dict()`. config.json and the tokenizer lie beside.

    Parameters
    ----------
    checkpoint
        A checkpoint or a run.
    out
        Where the folder goes; nothing may be there.
    dtype
        float32, bfloat16, float16 or float64; by default that of the stored weights.
    optimizer
        Write the optimizer's state too, as `optimizer.state.<name>.<key>`, as `get_state_dict` names it.
    allow_non_finite
        Write values that are not finite; by default they are refused by name.

    Raises
    ------
    InputError, MismatchError
        If `out` exists, there is no optimizer state, or values cannot be written so; nothing is visible then.
    """
    import torch.distributed.checkpoint as dcp

    (source,), path = stream.opened_for(Export(dtype=dtype), [checkpoint]), Path(out)
    if is_store(place(out)):
        raise InputError(f"torch.distributed.checkpoint writes to a directory, not to {out}; give a path.")
    if path.exists():
        raise InputError(f"{path} exists; an export is never written over something, choose another name.")
    if optimizer and source.optimizer is None:
        raise InputError(f"{source.path} holds no optimizer state; leave --optimizer out.")
    cast = getattr(torch, dtype) if dtype is not None else None
    weights = {name: _cast(lazy.view(), cast) for name, lazy in source.tensors.items()}
    for name, values in {} if allow_non_finite else weights.items():
        refuse_non_finite(name, values, source.tensors[name].view())
    weights |= {alias: weights[name] for alias, name in aliases(source).items()}
    state: dict[str, Any] = {"model": weights}
    if optimizer and source.optimizer is not None:
        moments: dict[str, dict[str, torch.Tensor]] = {}
        for name, lazy in source.optimizer.items():
            owner, _, key = name.rpartition("/")
            moments.setdefault(owner, {})[key] = lazy.view()
        state["optimizer"] = {"state": moments}
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_staging(path.parent)
    staging = staging_beside(path)
    try:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(staging), no_dist=True)
        documents.keep_json(staging / "config.json", Export(dtype=dtype).config([source]))
        for name, data in luggage(source).items():
            (staging / name).write_bytes(data)
        os.rename(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return {"path": str(path), "digest": source.digest, "tensors": len(weights), "optimizer": optimizer}


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.dtype.is_floating_point else tensor
