"""The frame of every operation: checkpoints in, one new checkpoint out, a few tensors in memory at a time.

A method sees tensors and nothing else. Opening, refusing what does not belong together, streaming over several threads,
dtypes, tied weights, the tokenizer, lineage and publishing are done here, once, for all of them.

A method that must know something of a whole tensor or of the whole model before it can make the first item (a threshold,
a norm) says so in `survey`, which walks through the inputs once more; nothing is ever held whole.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any, ClassVar

import torch

from cairn import catalog
from cairn.checkpoint.format import read
from cairn.checkpoint.format.compare import keys_that_differ, tokenizer_digest
from cairn.checkpoint.format.dtypes import DTYPES
from cairn.checkpoint.format.layout import ITEM_BYTES, TensorSpec
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.place import place
from cairn.checkpoint.format.read import Checkpoint, LazyTensor
from cairn.checkpoint.operating.walk import PIECE_ITEMS, TensorSlice, Walk, cores, widened, workers
from cairn.checkpoint.saving.write import Writer, as_bytes
from cairn.errors import InputError, MismatchError
from cairn.options import Options

WEIGHTS, OPTIMIZER, INGREDIENTS = "model", "optimizer", "ingredients"
"""The stems of the files of weights, of the optimizer's state, and of what callbacks of training keep."""

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

    def attachments(self, parents: Sequence[Checkpoint]) -> dict[str, list[TensorSpec]]:
        """Tensors that lie in files of their own beside the weights, by stem; by default none."""
        return {}

    def continues(self) -> int | None:
        """Which parent's training goes on in the result: its optimizer state, what its callbacks keep, its trainer.json and its recipe come
        out too. None, the default: the result holds no training state."""
        return None

    def documents(self, parents: Sequence[Checkpoint]) -> dict[str, Any]:
        """Small JSON files of the result besides config.json, by name; by default those of the training that goes on."""
        plain = parents[number].trainer if (number := self.continues()) is not None else None
        return {"trainer.json": plain} if plain is not None else {}

    def recipe(self, parents: Sequence[Checkpoint]) -> dict[str, Any] | None:
        """The recipe with which training goes on from the result, for lineage; None where it holds no training state."""
        origin = parents[number].lineage if (number := self.continues()) is not None else None
        return origin.options.get("recipe") if origin is not None else None

    def state_pieces(self, stem: str, spec: TensorSpec, parents: Sequence[Checkpoint]) -> Iterator[torch.Tensor]:
        """The values of one tensor of the training that goes on, as consecutive flat pieces; by default those that it has."""
        return copied(parents[self.continues() or 0].folder(stem)[spec.name])

    def changes(self, parents: Sequence[Checkpoint]) -> list[str]:
        """What the result has changed on purpose besides the weights, one plain line each, for lineage."""
        return []

    def prepare(self, parents: Sequence[Checkpoint], threads: int) -> Any:
        """What must be known of the whole model before any of its tensors is made; handed to `parts`."""
        return None

    @abstractmethod
    def pieces(self, spec: TensorSpec, parents: Sequence[Checkpoint]) -> Iterator[torch.Tensor]:
        """The values of one tensor of the result as consecutive flat pieces, of any floating dtype; cast by the frame."""

    def parts(self, spec: TensorSpec, parents: Sequence[Checkpoint], known: Any) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Everything that comes of one tensor of the result as (stem, name, flat piece), the pieces of each name in order.

        Called for several tensors at once, each by a thread of its own.
        """
        for piece in self.pieces(spec, parents):
            yield WEIGHTS, spec.name, piece


class Tensorwise(Operation):
    """Base of operations that make each tensor from the parents' tensors of the same name.

    Parents must agree in family, configuration, names, shapes and tokenizer. Tensors that are not floating point can
    not be combined: they must be equal and are carried over.
    """

    based: ClassVar[bool] = False
    """Whether the first parent is the base that the others were trained from."""
    elementwise: ClassVar[bool] = False
    """Whether an item of the result depends only on the same item of the inputs: large tensors then pass in pieces."""

    @abstractmethod
    def combine(self, name: str, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """One tensor of the result from those of the parents, in float32 (or float64 where they are float64), same shape."""

    def beside(self, name: str, tensors: Mapping[str, LazyTensor]) -> Sequence[str]:
        """Names of other tensors, of the same shape, on whose items at the same places an item of `name` depends too; by default none.

        Of an elementwise operation alone: `combine_beside` then makes the tensor from pieces of all of them.
        """
        return ()

    def combine_beside(self, name: str, inputs: Sequence[torch.Tensor], beside: Mapping[str, Sequence[torch.Tensor]]) -> torch.Tensor:
        """`combine` for a tensor that depends on others, which are given by name, one per parent."""
        raise NotImplementedError(f"{type(self).__name__} makes every tensor from those of its own name")

    def check(self, parents: Sequence[Checkpoint]) -> None:
        for other in parents[1:]:
            refuse_strangers(parents[0], other)
        for name, tensor in parents[0].tensors.items():
            if not tensor.dtype.is_floating_point and self.carrier(name) is None:
                _refuse_other_integers(name, parents)

    def carrier(self, name: str) -> int | None:
        """Which parent's tensor of this name comes out where it is not floating point; None asks that it be equal in all."""
        return None

    def pieces(self, spec: TensorSpec, parents: Sequence[Checkpoint]) -> Iterator[torch.Tensor]:
        if not parents[0].tensors[spec.name].dtype.is_floating_point:
            yield parents[self.carrier(spec.name) or 0].tensors[spec.name].load().reshape(-1)
        elif others := self.beside(spec.name, parents[0].tensors):
            walks = [Walk(parents, [parents[0].tensors[name].spec]).pieces() for name in (spec.name, *others)]
            for piece, *rest in zip(*walks, strict=True):
                yield self.combine_beside(spec.name, piece.inputs, {other.name: other.inputs for other in rest})
        elif self.elementwise:
            for piece in Walk(parents, [spec]).pieces():
                yield self.combine(spec.name, piece.inputs)
        else:
            yield self.combine(spec.name, [widened(parent.tensors[spec.name].load()) for parent in parents]).reshape(-1)


class Surveyed(Tensorwise):
    """Base of operations that make an item from the same item of the inputs and from what a survey found.

    The survey walks through one tensor, or through the whole model where `whole_model` says so.
    """

    def whole_model(self) -> bool:
        """Whether the survey is of the whole model instead of each tensor."""
        return False

    @abstractmethod
    def survey(self, walk: Walk) -> Any:
        """What `blend` must know: found in as many passes through `walk` as it takes."""

    @abstractmethod
    def blend(self, piece: TensorSlice, known: Any) -> torch.Tensor:
        """The items of the result that belong to a piece, flat."""

    def combine(self, name: str, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError("a surveyed operation blends pieces")

    def prepare(self, parents: Sequence[Checkpoint], threads: int) -> Any:
        return self.survey(Walk(parents, self.outputs(parents), threads)) if self.whole_model() else None

    def parts(self, spec: TensorSpec, parents: Sequence[Checkpoint], known: Any) -> Iterator[tuple[str, str, torch.Tensor]]:
        walk = Walk(parents, [spec])
        if not walk.specs:
            yield from super().parts(spec, parents, known)
            return
        known = known if self.whole_model() else self.survey(walk)
        for piece in walk.pieces():
            yield WEIGHTS, spec.name, self.blend(piece, known)


def piecewise(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of items that cover a tensor, each of at most PIECE_ITEMS; one empty range for an empty tensor."""
    count = math.prod(spec.shape)
    for begin in range(0, max(count, 1), PIECE_ITEMS):
        yield begin, min(begin + PIECE_ITEMS, count)


def copied(tensor: LazyTensor) -> Iterator[torch.Tensor]:
    """A tensor as it is, in consecutive flat pieces."""
    for begin, end in piecewise(tensor.spec):
        yield tensor.flat(begin, end)


def _state(operation: Operation, parents: Sequence[Checkpoint]) -> dict[str, list[TensorSpec]]:
    """The tensors of the training that goes on in the result, by stem."""
    number = operation.continues()
    if number is None:
        return {}
    kept = {OPTIMIZER: parents[number].optimizer, INGREDIENTS: parents[number].ingredients}
    return {stem: [tensor.spec for tensor in folder.values()] for stem, folder in kept.items() if folder}


def apply(
    operation: Operation,
    parents: Sequence[str | Path | Checkpoint],
    out: str | Path,
    *,
    name: str | None = None,
    also: Mapping[str, Any] | None = None,
    shard_bytes: int | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Checkpoint:
    """Run an operation on `parents` and publish the result at `out`.

    `name` is what lineage calls it, by default its name in the catalog; `also` are facts that lineage keeps beside the
    options (how they were found, say). Weights, config and tokenizer come out; optimizer state does not survive an
    operation that does not say so. `threads` work on different tensors at once (default: one a core) and change no bit. `progress` is told
    (bytes done, bytes in all). Raises `InputError` or `MismatchError` before anything is written.
    """
    opened = opened_for(operation, parents)
    state = _state(operation, opened)
    groups = {WEIGHTS: operation.outputs(opened), **operation.attachments(opened), **state}
    out, recipe = place(out), operation.recipe(opened)
    lost = OPTIMIZER not in groups and any(parent.optimizer is not None for parent in opened)
    lineage = Lineage.record(
        "operation",
        name or catalog.name_of(operation) or type(operation).__name__,
        parents=opened,
        options={**operation.model_dump(mode="json"), **({"recipe": recipe} if recipe is not None else {}), **(also or {})},
        changed=operation.changes(opened) + (["optimizer state: kept -> none"] if lost else []),
        directory=out.parent,
    )
    with Writer(out) as writer:
        writer.put_json("config.json", operation.config(opened))
        for filename, document in operation.documents(opened).items():
            writer.put_json(filename, document)
        for filename in CARRIED:
            if (opened[0].path / filename).is_file():
                writer.put_file(filename, (opened[0].path / filename).read_bytes())
        for stem, specs in groups.items():
            writer.declare(stem, specs, shard_bytes)
        codes = {(stem, spec.name): spec.dtype for stem, specs in groups.items() for spec in specs}

        def put(stem: str, tensor: str, begin: int, values: torch.Tensor) -> None:
            code = codes[stem, tensor]
            writer.put_bytes(stem, tensor, begin * ITEM_BYTES[code], as_bytes(values.to(DTYPES[code])))

        _make(operation, opened, state, put, threads or cores(), progress)
        return writer.publish(lineage)


def results(operation: Operation, parents: Sequence[str | Path | Checkpoint], into: Mapping[str, torch.Tensor], *, threads: int | None = None) -> None:
    """Make the weights that `apply` would write in the tensors of `into`, by name, and write nothing; others are left as they are.

    Where `into` is of the stored dtype, the values are those that `apply` writes, bit for bit.
    """
    opened = opened_for(operation, parents)

    def put(stem: str, tensor: str, begin: int, values: torch.Tensor) -> None:
        if stem == WEIGHTS and tensor in into:
            into[tensor].view(-1)[begin : begin + values.numel()] = values.to(into[tensor].dtype)

    with torch.no_grad():
        _make(operation, opened, {}, put, threads or 1, None)


def opened_for(operation: Operation, parents: Sequence[str | Path | Checkpoint]) -> list[Checkpoint]:
    """The parents, opened, if the operation can work on them; raises with the reason if not."""
    opened = [item if isinstance(item, Checkpoint) else read.open(item) for item in parents]
    if not opened:
        raise InputError("An operation needs at least one checkpoint.")
    operation.check(opened)
    return opened


def _make(
    operation: Operation,
    parents: Sequence[Checkpoint],
    state: Mapping[str, Sequence[TensorSpec]],
    put: Callable[[str, str, int, torch.Tensor], None],
    threads: int,
    progress: Callable[[int, int], object] | None,
) -> None:
    """Hand every piece of the result, and of the training state that it keeps, to `put`, several tensors at a time, the largest first
    so that none is left for the end alone."""
    jobs = [(WEIGHTS, spec) for spec in operation.outputs(parents)] + [(stem, spec) for stem, specs in state.items() for spec in specs]
    jobs.sort(key=lambda job: -job[1].nbytes)
    total, done = sum(spec.nbytes for _, spec in jobs), 0
    known = operation.prepare(parents, threads)
    stopped = threading.Event()

    def pieces(stem: str, spec: TensorSpec) -> Iterator[tuple[str, str, torch.Tensor]]:
        if stem == WEIGHTS:
            return operation.parts(spec, parents, known)
        return ((stem, spec.name, values) for values in operation.state_pieces(stem, spec, parents))

    def make(job: tuple[str, TensorSpec]) -> int:
        begin: dict[tuple[str, str], int] = defaultdict(int)
        for stem, tensor, values in pieces(*job):
            if stopped.is_set():
                break
            put(stem, tensor, begin[stem, tensor], values)
            begin[stem, tensor] += values.numel()
        return job[1].nbytes

    with workers(threads) as pool:
        try:
            for made in as_completed([pool.submit(make, job) for job in jobs]):
                done += made.result()
                if progress is not None:
                    progress(done, total)
        finally:
            stopped.set()


def _refuse_other_integers(name: str, parents: Sequence[Checkpoint]) -> None:
    first = parents[0].tensors[name].load()
    if any(not torch.equal(first, other.tensors[name].load()) for other in parents[1:]):
        raise MismatchError(f"'{name}' holds {first.dtype} values that differ between the inputs, and such values can not be combined.")


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
