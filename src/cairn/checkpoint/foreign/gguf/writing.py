"""A checkpoint as one GGUF file: the tables of `families` and `vocabulary` read in the other direction, tensors one at a time."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cairn import catalog
from cairn.checkpoint.foreign.export import Export
from cairn.checkpoint.foreign.gguf.config import family_for, metadata_of, rope_tensors
from cairn.checkpoint.foreign.gguf.families import ALIKE, Family, done, heads_of
from cairn.checkpoint.foreign.gguf.file import package
from cairn.checkpoint.foreign.gguf.vocabulary import metadata_of as tokenizer_metadata
from cairn.checkpoint.format.carried import chat_template
from cairn.checkpoint.format.lazy import LazyTensor
from cairn.checkpoint.format.place import is_store, place
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.format.redundant import redundant
from cairn.checkpoint.operating import stream
from cairn.checkpoint.operating.values import refuse_non_finite
from cairn.checkpoint.saving.disk import staging_beside, sweep_staging
from cairn.errors import InputError, MismatchError

TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q4_1": 3}
"""Types of matrices that can be written, with the number by which a file says what most of it is."""
BLOCK = 32
"""Values of a block of the quantized types; rows that are no multiple of it stay F16."""
FINE = ("token_embd.weight", "output.weight")
"""What suffers most from four bits, and is stored in eight where the rest has four."""
_STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class _Out:
    """One tensor of the file: its name and type there, its shape, and how its values are made."""

    name: str
    kind: str
    shape: tuple[int, ...]
    values: Callable[[], torch.Tensor]


def export_gguf(
    checkpoint: str | Path | Checkpoint,
    out: str | Path,
    *,
    type: str | None = None,
    allow_non_finite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Any]:
    """Write the weights, the config and the tokenizer of a checkpoint as one GGUF file for llama.cpp and what builds on it.

    Parameters
    ----------
    checkpoint
        A checkpoint or a run, of a family that llama.cpp computes the same way.
    out
        The file; nothing may be there.
    type
        F32, F16, BF16, Q8_0, Q4_0 or Q4_1, for matrices; by default as they are stored. Vectors are always F32, and with four bits the
        embedding and the head have eight.
    allow_non_finite
        Write values that are not finite; by default they are refused by name.
    progress
        Told (bytes done, bytes in all) of what is read.

    Returns
    -------
    `path`, `type`, `tensors`, `bytes`, the `digest` of what was exported and the `types` of tensors with how many have each.

    Raises
    ------
    InputError, MismatchError
        For a family, a rope, a tokenizer or an order of layers that a GGUF file cannot say, and a place that is taken; nothing is written then.

    Examples
    --------
    >>> export_gguf("runs/a", "a.gguf", type="Q8_0")  # doctest: +SKIP
    """
    gguf = package()
    (source,), path = stream.opened_for(Export(), [checkpoint]), Path(out)
    if is_store(place(out)):
        raise InputError(f"A GGUF file is written to a disk, not to {out}; give a path.")
    if path.exists():
        raise InputError(f"{path} exists; an export is never written over something, choose another name.")
    stored = next(iter(source.tensors.values())).dtype
    kind = type or _STORED.get(stored, "F32")
    if kind not in TYPES:
        raise InputError(f"type is one of {', '.join(TYPES)}, not '{kind}'.")
    family, described = _described(source)
    values = {**metadata_of(source.config, described, family, source.path), **_tokenizer(source, described.vocab_size)}
    tensors = list(_tensors(source, family, described, kind))
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_staging(path.parent)
    staging = staging_beside(path)
    staging.mkdir()
    total, finished = sum(tensor.nbytes for tensor in source.tensors.values()), 0
    try:
        writer = gguf.GGUFWriter(staging / path.name, family.architecture)
        writer.add_type("model")
        writer.add_name(source.path.resolve().name)
        writer.add_file_type(TYPES[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_string("cairn.digest", source.digest)
        for key, value in values.items():
            _add(writer, gguf, key, value)
        for tensor in tensors:
            number = gguf.GGMLQuantizationType[tensor.kind]
            nbytes = int(np.prod(gguf.quant_shape_to_byte_shape(tensor.shape, number)))
            shape = tensor.shape if tensor.kind in ("F32", "F16") else gguf.quant_shape_to_byte_shape(tensor.shape, number)
            writer.add_tensor_info(tensor.name, shape, _NUMPY.get(tensor.kind, np.dtype(np.uint8)), nbytes, raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            wide = tensor.values().contiguous()
            if not allow_non_finite:
                refuse_non_finite(tensor.name, wide)
                _refuse_too_large(tensor, wide)
            writer.write_tensor_data(gguf.quants.quantize(wide.numpy(), gguf.GGMLQuantizationType[tensor.kind]))
            finished += wide.numel() * stored.itemsize
            if progress is not None:
                progress(min(finished, total), total)
        writer.close()
        os.rename(staging / path.name, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    kinds = [tensor.kind for tensor in tensors]
    counts = {name: kinds.count(name) for name in sorted(set(kinds))}
    return {"path": str(path), "type": kind, "tensors": len(tensors), "types": counts, "bytes": path.stat().st_size, "digest": source.digest}


def _refuse_too_large(tensor: _Out, values: torch.Tensor) -> None:
    """Raise `InputError` for values that float16, of which quantized blocks have their scale, cannot say."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    if tensor.kind not in ("F32", "BF16") and largest > torch.finfo(torch.float16).max:
        raise InputError(f"'{tensor.name}' holds {largest:g}, which {tensor.kind} cannot say; choose BF16 or F32.")


_NUMPY = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}


def _described(source: Checkpoint) -> tuple[Family, Any]:
    """The family there, and the architecture of ours that says sizes with their defaults."""
    family = family_for(source.config, source.path)
    name = ALIKE.get(str(source.config["model_type"]), str(source.config["model_type"]))
    if not catalog.has("architecture", name):
        raise InputError(f"{source.path} is of the family '{name}', which cairn does not build itself, so it cannot be written as GGUF.")
    return family, catalog.get("architecture", name).implementation.from_hf(source.config)


def _tokenizer(source: Checkpoint, rows: int) -> dict[str, Any]:
    tokenizer = source.tokenizer
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    return tokenizer_metadata(tokenizer.definition, tokenizer.config, sorted(tokenizer.end_ids), chat_template(source), rows, source.path)


def _tensors(source: Checkpoint, family: Family, described: Any, kind: str) -> Iterator[_Out]:
    for name, factors in rope_tensors(described, source.path).items():
        yield _Out(name, "F32", tuple(factors.shape), functools.partial(_whole, factors))
    experts: dict[str, dict[int, LazyTensor]] = {}
    repeated = redundant(source)
    for name, lazy in source.tensors.items():
        if name in repeated:
            continue
        if (expert := family.expert_there(name)) is not None:
            experts.setdefault(expert[0], {})[expert[1]] = lazy
            continue
        there = family.there(name)
        if there is None:
            raise MismatchError(f"{source.path}: the tensor '{name[:80]}' has no place in a GGUF file of '{family.architecture}'.")
        change, heads = family.change(there), heads_of({**source.config, "num_attention_heads": described.num_attention_heads}, there)
        shape = tuple(done(change, torch.empty(lazy.shape, device="meta"), heads).shape)
        yield _Out(there, _kind(there, shape, kind), shape, _made(lazy, change, heads))
    for there, found in experts.items():
        together = [found[number] for number in sorted(found)]
        shape = (len(together), *together[0].shape)
        yield _Out(there, _kind(there, shape, kind), shape, functools.partial(_stacked, together))


def _whole(values: torch.Tensor) -> torch.Tensor:
    return values


def _stacked(experts: Sequence[LazyTensor]) -> torch.Tensor:
    return torch.stack([expert.load().float() for expert in experts])


def _made(lazy: LazyTensor, change: Any, heads: int) -> Callable[[], torch.Tensor]:
    return lambda: done(change, lazy.load().float(), heads)


def _kind(name: str, shape: Sequence[int], kind: str) -> str:
    """The type of one tensor where matrices are to be of `kind`."""
    if len(shape) < 2 or name.startswith("position_embd") or ".ffn_gate_inp." in name:
        return "F32"
    if kind.startswith("Q") and shape[-1] % BLOCK:
        return "F16"
    return "Q8_0" if kind.startswith("Q4") and name in FINE else kind


def _add(writer: Any, gguf: Any, key: str, value: Any) -> None:
    """One key of the metadata, in the kind in which llama.cpp reads it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, (list, Mapping)) and value:
        writer.add_array(key, value)
