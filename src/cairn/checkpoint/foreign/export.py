"""Export: a checkpoint for other programs, in any floating dtype: for transformers, or for torch.distributed.checkpoint; or a whole copy."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from cairn.checkpoint.format import read
from cairn.checkpoint.format.layout import TensorSpec
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.manifest import LINEAGE
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating import stream
from cairn.checkpoint.saving.write import Writer, as_bytes
from cairn.errors import InputError

CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


class Export(stream.Operation):
    """The weights alone, cast to `dtype` if one is given."""

    dtype: str | None = None

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
    progress: Callable[[int, int], object] | None = None,
) -> Checkpoint:
    """Write the weights, config and tokenizer of a checkpoint to `out`, a directory that transformers opens.

    `dtype` is float32, bfloat16, float16 or float64; files larger than `shard_bytes` are split, with an index.
    """
    return stream.apply(Export(dtype=dtype), [checkpoint], out, name="export", shard_bytes=shard_bytes, progress=progress)


def copy(checkpoint: str | Path | Checkpoint, out: str | Path, *, progress: Callable[[int, int], object] | None = None) -> Checkpoint:
    """Write a checkpoint once more at `out`, with its training state, its lineage and so its digest: from a store to a disk, or back.

    Raises `MismatchError` if what was read is not what the manifest says was written.
    """
    source = checkpoint if isinstance(checkpoint, Checkpoint) else read.open(checkpoint)
    folders = {stem: folder for stem, folder in (("model", source.tensors), ("optimizer", source.optimizer), ("ingredients", source.ingredients)) if folder}
    total, done = sum(folder.nbytes for folder in folders.values()), 0
    laid_out = {layout.filename for folder in folders.values() for layout in folder.layouts}
    with Writer(out) as writer:
        for name in sorted(source.manifest.files):
            if name not in laid_out and name != LINEAGE:
                writer.put_file(name, (source.path / name).read_bytes())
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


def export_dcp(checkpoint: str | Path | Checkpoint, out: str | Path, *, dtype: str | None = None, optimizer: bool = False) -> dict[str, Any]:
    """Write a folder that torch.distributed.checkpoint loads, with its own writer: `model.<name>` for the weights.

    With `optimizer`, also `optimizer.state.<name>.<key>` as `get_state_dict` names them. config.json and the tokenizer lie
    beside. Raises `InputError` if `out` exists or there is no optimizer state; nothing is visible before all is written.
    """
    import torch.distributed.checkpoint as dcp

    source, path = checkpoint if isinstance(checkpoint, Checkpoint) else read.open(checkpoint), Path(out)
    if path.exists():
        raise InputError(f"{path} exists; an export is never written over something, choose another name.")
    if dtype is not None and dtype not in CODES:
        raise InputError(f"dtype is one of {', '.join(CODES)}, not '{dtype}'.")
    if optimizer and source.optimizer is None:
        raise InputError(f"{source.path} holds no optimizer state; leave --optimizer out.")
    cast = getattr(torch, dtype) if dtype is not None else None
    state: dict[str, Any] = {"model": {name: _cast(lazy.view(), cast) for name, lazy in source.tensors.items()}}
    if optimizer and source.optimizer is not None:
        moments: dict[str, dict[str, torch.Tensor]] = {}
        for name, lazy in source.optimizer.items():
            owner, _, key = name.rpartition("/")
            moments.setdefault(owner, {})[key] = lazy.view()
        state["optimizer"] = {"state": moments}
    staging = path.with_name(f".exporting-{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(staging), no_dist=True)
        (staging / "config.json").write_text(json.dumps(source.config | ({"dtype": dtype, "torch_dtype": dtype} if dtype else {}), indent=2) + "\n")
        for name in stream.CARRIED:
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, staging / name)
        os.rename(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return {"path": str(path), "digest": source.digest, "tensors": len(state["model"]), "optimizer": optimizer}


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.dtype.is_floating_point else tensor
