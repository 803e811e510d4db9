"""The frame of every operation: checkpoints in, one new checkpoint out, a few tensors in memory at a time.

A method sees tensors and nothing else. Opening, refusing what does not belong together, streaming, dtypes, tied
weights, the tokenizer, lineage and publishing are done here, once, for all of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from cairn import catalog
from cairn.checkpoint import read
from cairn.checkpoint.compare import keys_that_differ, tokenizer_digest
from cairn.checkpoint.dtypes import DTYPES
from cairn.checkpoint.layout import ITEM_BYTES, TensorSpec
from cairn.checkpoint.lineage import Lineage
from cairn.checkpoint.place import place
from cairn.checkpoint.read import Checkpoint
from cairn.checkpoint.write import Writer, as_bytes
from cairn.errors import InputError, MismatchError
from cairn.options import Options

PIECE_BYTES = 8 * 2**20
"""Bytes of one tensor that an elementwise operation holds at a time."""

CARRIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "generation_config.json")
"""Files that go from the first parent to the result unchanged."""

_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
"""Keys of config.json that say nothing about whether two models fit together."""


class Operation(Options, ABC):
    """Base of all operations: what the result consists of, and each of its tensors in turn."""

    def check(self, parents: Sequence[Checkpoint]) -> None:
        """Refuse parents that this operation can not work on, with `InputError` or `MismatchError`, before anything is written."""

    def config(self, parents: Sequence[Checkpoint]) -> dict[str, Any]:
        """config.json of the result; by default the first parent's."""
        return parents[0].config

    def outputs(self, parents: Sequence[Checkpoint]) -> list[TensorSpec]:
        """The tensors of the result; by default the first parent's."""
        return [tensor.spec for tensor in parents[0].tensors.values()]

    @abstractmethod
    def pieces(self, spec: TensorSpec, parents: Sequence[Checkpoint]) -> Iterator[torch.Tensor]:
        """The values of one tensor of the result as consecutive flat pieces, of any floating dtype; cast by the frame."""


class Tensorwise(Operation):
    """Base of operations that make each tensor from the parents' tensors of the same name.

    Parents must agree in family, configuration, names, shapes and tokenizer. Tensors that are not floating point can
    not be combined: they must be equal and are carried over.
    """

    elementwise: ClassVar[bool] = False
    """Whether an item of the result depends only on the same item of the inputs: large tensors then pass in pieces."""

    @abstractmethod
    def combine(self, name: str, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """One tensor of the result from those of the parents, in float32 (or float64 where they are float64), same shape."""

    def check(self, parents: Sequence[Checkpoint]) -> None:
        for other in parents[1:]:
            refuse_strangers(parents[0], other)

    def pieces(self, spec: TensorSpec, parents: Sequence[Checkpoint]) -> Iterator[torch.Tensor]:
        lazy = [parent.tensors[spec.name] for parent in parents]
        if not lazy[0].dtype.is_floating_point:
            first, *others = (tensor.load() for tensor in lazy)
            if any(not torch.equal(other, first) for other in others):
                raise MismatchError(f"'{spec.name}' holds {first.dtype} values that differ between the inputs, and such values can not be combined.")
            yield first.reshape(-1)
        elif self.elementwise:
            buffers = [torch.empty(PIECE_BYTES // ITEM_BYTES[spec.dtype], dtype=tensor.dtype) for tensor in lazy]
            for begin, end in piecewise(spec):
                inputs = [tensor.flat(begin, end, buffer) for tensor, buffer in zip(lazy, buffers, strict=True)]
                yield self.combine(spec.name, [widened(tensor) for tensor in inputs])
        else:
            yield self.combine(spec.name, [widened(tensor.load()) for tensor in lazy]).reshape(-1)


def piecewise(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of items that cover a tensor, each of at most PIECE_BYTES; one empty range for an empty tensor."""
    count, step = math.prod(spec.shape), PIECE_BYTES // ITEM_BYTES[spec.dtype]
    for begin in range(0, max(count, 1), step):
        yield begin, min(begin + step, count)


def apply(
    operation: Operation,
    parents: Sequence[str | Path | Checkpoint],
    out: str | Path,
    *,
    name: str | None = None,
    shard_bytes: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Checkpoint:
    """Run an operation on `parents` and publish the result at `out`.

    `name` is what lineage calls it, by default its name in the catalog. Weights, config and tokenizer come out; optimizer
    state does not survive an operation. `progress` is told (bytes done, bytes in all). Raises `InputError` or
    `MismatchError` before anything is written.
    """
    opened = [item if isinstance(item, Checkpoint) else read.open(item) for item in parents]
    if not opened:
        raise InputError("An operation needs at least one checkpoint.")
    operation.check(opened)
    specs = operation.outputs(opened)
    total, done = sum(spec.nbytes for spec in specs), 0
    out = place(out)
    lineage = Lineage.record(
        "operation",
        name or catalog.name_of(operation) or type(operation).__name__,
        parents=opened,
        options=operation.model_dump(mode="json"),
        changed=["optimizer state: kept -> none"] if any(parent.optimizer is not None for parent in opened) else [],
        directory=out.parent,
    )
    with Writer(out) as writer:
        writer.put_json("config.json", operation.config(opened))
        for name in CARRIED:
            if (opened[0].path / name).is_file():
                writer.put_file(name, (opened[0].path / name).read_bytes())
        writer.declare("model", specs, shard_bytes)
        for spec in specs:
            offset = 0
            for piece in operation.pieces(spec, opened):
                data = as_bytes(piece.to(DTYPES[spec.dtype]))
                writer.put_bytes("model", spec.name, offset, data)
                offset += len(data)
            done += spec.nbytes
            if progress is not None:
                progress(done, total)
        return writer.publish(lineage)


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """In the precision in which sums are made: float32, or float64 where the tensor already is."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def refuse_strangers(first: Checkpoint, other: Checkpoint) -> None:
    """Raise `MismatchError` with the reason if two checkpoints are not of one family, shape and tokenizer."""
    pair = f"{first.path} and {other.path}"
    differing = {k: v for k, v in keys_that_differ(first.config, other.config).items() if k.split(".")[0] not in _VOLATILE}
    if "model_type" in differing:
        raise MismatchError(f"{pair} are of different families: {differing['model_type'][0]} and {differing['model_type'][1]}.")
    missing = sorted(set(first.tensors) ^ set(other.tensors))
    if missing:
        holder = first if missing[0] in first.tensors else other
        raise MismatchError(f"{pair} do not have the same tensors: only {holder.path} has '{missing[0]}'.")
    for name, tensor in first.tensors.items():
        if tensor.shape != other.tensors[name].shape:
            raise MismatchError(f"{pair} have different shapes: '{name}' is {tensor.shape} in one and {other.tensors[name].shape} in the other.")
    if differing:
        key, (old, new) = next(iter(differing.items()))
        raise MismatchError(f"{pair} are configured differently: {key} is {old} in one and {new} in the other.")
    digests = [tokenizer_digest(first), tokenizer_digest(other)]
    if None not in digests and digests[0] != digests[1]:
        raise MismatchError(f"{pair} have different tokenizers, so the rows of their embeddings do not mean the same tokens.")
