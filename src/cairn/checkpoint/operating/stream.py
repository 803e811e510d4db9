"""The frame of every operation: checkpoints in, one new checkpoint out, a few tensors in memory at a time.

A method sees tensors and nothing else. Opening, refusing what does not belong together, streaming over several threads,
dtypes, tied weights, the tokenizer, lineage and publishing are done here, once, for all of them.

A method that must know something of a whole tensor or of the whole model before it can make the first item (a threshold,
a norm) says so in `survey`, which walks through the inputs once more; nothing is ever held whole.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from cairn import catalog
from cairn.checkpoint.format import read
from cairn.checkpoint.format.carried import own_luggage
from cairn.checkpoint.format.dtypes import DTYPES, MASTER
from cairn.checkpoint.format.layout import ITEM_BYTES, TensorSpec
from cairn.checkpoint.format.lazy import LazyTensor
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.place import is_store, new_place
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.format.redundant import redundant
from cairn.checkpoint.operating.sameness import refuse_strangers, settings_of_the_first
from cairn.checkpoint.operating.values import FLOATS, refuse_non_finite, refuse_quantized
from cairn.checkpoint.operating.walk import PIECE_ITEMS, TensorSlice, Walk, cores, widened, workers
from cairn.checkpoint.saving.write import Writer, as_bytes
from cairn.errors import CairnError, InputError, MismatchError
from cairn.options import Options

WEIGHTS, OPTIMIZER, INGREDIENTS = "model", "optimizer", "ingredients"
"""The stems of the files of weights, of the optimizer's state, and of what callbacks of training keep."""


@dataclass
class Context:
    """What an operation is given to work with, besides its parents: none of it is an option of the method.

    `threads` work on different tensors at once; `work` is a folder that survives a kill; `device` is where models compute; `say` is told
    one line about long work.
    """

    threads: int = 1
    work: Path | None = None
    device: str | None = None
    say: Callable[[str], object] | None = None


class Operation(Options, ABC):
    """Base of all operations: what the result consists of, and each of its tensors in turn."""

    catalog_kind: ClassVar[str] = "operation"
    sample_parents: ClassVar[int] = 2
    """How many checkpoints the conformance suite gives it."""
    sample_options: ClassVar[dict[str, Any]] = {}
    """Options without which the conformance suite cannot try it on small checkpoints that nobody trained."""

    def check(self, parents: Sequence[Checkpoint]) -> None:
        """Refuse parents that this operation cannot work on, with `InputError` or `MismatchError`, before anything is written."""

    def config(self, parents: Sequence[Checkpoint]) -> dict[str, Any]:
        """config.json of the result; by default the first parent's."""
        return parents[0].config

    def outputs(self, parents: Sequence[Checkpoint]) -> list[TensorSpec]:
        """The tensors of the result; by default the first parent's."""
        return [tensor.spec for tensor in parents[0].tensors.values()]

    def attachments(self, parents: Sequence[Checkpoint]) -> dict[str, list[TensorSpec]]:
        """Tensors that lie in files of their own beside the weights, by stem; by default none."""
        return {}

    def copies(self) -> bool:
        """Whether values come out as they were stored, so that it does not matter what they mean."""
        return False

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

    def carries(self, parents: Sequence[Checkpoint]) -> Sequence[Checkpoint]:
        """The parents whose tokenizer, chat template and generation settings come out, the files of later ones before those of earlier ones; by
        default the first parent."""
        return parents[:1]

    def luggage(self, parents: Sequence[Checkpoint]) -> dict[str, bytes]:
        """The files of tokenizer, chat template and generation settings that come out; by default those of the parents that `carries` names."""
        return {name: data for giver in self.carries(parents) for name, data in own_luggage(giver).items()}

    def facts(self, parents: Sequence[Checkpoint]) -> dict[str, Any]:
        """What lineage keeps beside the options: the digest of data that were seen, say."""
        return {}

    def prepare(self, parents: Sequence[Checkpoint], context: Context) -> Any:
        """What must be known of the whole model before any of its tensors is made; handed to `parts`. Nothing is written yet."""
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
            if tensor.spec.dtype not in FLOATS and self.carrier(name) is None:
                _refuse_other_integers(name, parents)

    def carrier(self, name: str) -> int | None:
        """Which parent's tensor of this name comes out where it is not floating point; None asks that it be equal in all."""
        return None

    def pieces(self, spec: TensorSpec, parents: Sequence[Checkpoint]) -> Iterator[torch.Tensor]:
        if spec.dtype not in FLOATS:
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

    def prepare(self, parents: Sequence[Checkpoint], context: Context) -> Any:
        return self.survey(Walk(parents, self.outputs(parents), context.threads)) if self.whole_model() else None

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
    # What weights were rounded from is not what the result's weights are rounded from.
    return {stem: [each.spec for name, each in folder.items() if not name.endswith(f"/{MASTER}")] for stem, folder in kept.items() if folder}


def apply(
    operation: Operation,
    parents: Sequence[str | Path | Checkpoint],
    out: str | Path,
    *,
    name: str | None = None,
    also: Mapping[str, Any] | None = None,
    shard_bytes: int | None = None,
    threads: int | None = None,
    allow_non_finite: bool = False,
    device: str | None = None,
    say: Callable[[str], object] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Checkpoint:
    """Run an operation on `parents` and publish the result at `out`.

    Weights, config, tokenizer, chat template and generation settings come out, the last three those of the first parent. Optimizer state
    does not survive an operation that does not say so.

    Parameters
    ----------
    operation
        The configured method.
    parents
        Checkpoints, or where they lie.
    out
        Where the result goes; a path or the URL of a store, and nothing may be there.
    name
        What lineage calls the operation; by default its name in the catalog.
    also
        Facts that lineage keeps beside the options (how they were found, say).
    shard_bytes
        Split the weights into files of at most so many bytes.
    threads
        How many tensors are worked on at once (default: one a core); changes no bit.
    allow_non_finite
        Write values that are not finite. By default they are refused by name.
    device
        Where an operation that runs the model computes.
    say
        Told a line about each part of long work.
    progress
        Told (bytes done, bytes in all) while the result is written.

    Raises
    ------
    InputError, MismatchError
        Before anything is written; for values that are not finite while it is, and then nothing is left behind.
    """
    opened = opened_for(operation, parents)
    out = new_place(out)
    if not is_store(out) and out.exists():
        raise InputError(f"{out} exists; a checkpoint is never overwritten, choose another name.")
    state, recipe = _state(operation, opened), operation.recipe(opened)
    groups = {WEIGHTS: operation.outputs(opened), **operation.attachments(opened), **state}
    lost = OPTIMIZER not in groups and any(parent.optimizer is not None for parent in opened)
    options = {**operation.model_dump(mode="json"), **({"recipe": recipe} if recipe is not None else {}), **operation.facts(opened), **(also or {})}
    called = name or catalog.name_of(operation) or type(operation).__name__
    work = None if is_store(out) else out.parent / f".working-{out.name}"
    context = Context(threads or cores(), work, device, say)
    known = operation.prepare(opened, context)
    givers = operation.carries(opened)
    luggage = operation.luggage(opened)
    told = settings_of_the_first(opened) if givers[1:] == [] else []
    changed = operation.changes(opened) + told + (["optimizer state: kept -> none"] if lost else [])
    lineage = Lineage.record("operation", called, parents=opened, options=options, changed=changed, directory=out.parent)
    codes = {(stem, spec.name): spec.dtype for stem, specs in groups.items() for spec in specs}
    with Writer(out) as writer:
        writer.put_json("config.json", operation.config(opened))
        for filename, document in operation.documents(opened).items():
            writer.put_json(filename, document)
        for filename, data in luggage.items():
            writer.put_file(filename, data)
        for stem, specs in groups.items():
            writer.declare(stem, specs, shard_bytes)

        def put(stem: str, tensor: str, begin: int, values: torch.Tensor) -> None:
            code = codes[stem, tensor]
            cast = values.to(DTYPES[code])
            if not allow_non_finite:
                refuse_non_finite(tensor, cast, values, begin)
            writer.put_bytes(stem, tensor, begin * ITEM_BYTES[code], as_bytes(cast))

        try:
            _make(operation, opened, state, known, put, context.threads, progress)
            published = writer.publish(lineage)
        except CairnError:
            _forget(work)  # a refusal is no kill: the same command would be refused again
            raise
    _forget(work)
    return published


def _forget(work: Path | None) -> None:
    if work is not None:
        shutil.rmtree(work, ignore_errors=True)


def results(operation: Operation, parents: Sequence[str | Path | Checkpoint], into: Mapping[str, torch.Tensor], *, threads: int | None = None) -> None:
    """Make the weights that `apply` would write in the tensors of `into`, by name, and write nothing; others are left as they are.

    Where `into` is of the stored dtype, the values are those that `apply` writes, bit for bit.
    """
    opened = opened_for(operation, parents)

    def put(stem: str, tensor: str, begin: int, values: torch.Tensor) -> None:
        if stem == WEIGHTS and tensor in into:
            into[tensor].view(-1)[begin : begin + values.numel()] = values.to(into[tensor].dtype)

    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="cairn-") as folder:
        known = operation.prepare(opened, Context(threads or 1, Path(folder)))
        _make(operation, opened, {}, known, put, threads or 1, None)


def opened_for(operation: Operation, parents: Sequence[str | Path | Checkpoint]) -> list[Checkpoint]:
    """The parents, opened and without tensors that say nothing new, if the operation can work on them; raises with the reason if not."""
    opened = [item if isinstance(item, Checkpoint) else read.open(item) for item in parents]
    if not opened:
        raise InputError("An operation needs at least one checkpoint.")
    opened = [parent if parent.is_adapter else parent.without(redundant(parent)) for parent in opened]
    if not operation.copies():
        refuse_quantized(opened)
    operation.check(opened)
    return opened


def _make(
    operation: Operation,
    parents: Sequence[Checkpoint],
    state: Mapping[str, Sequence[TensorSpec]],
    known: Any,
    put: Callable[[str, str, int, torch.Tensor], None],
    threads: int,
    progress: Callable[[int, int], object] | None,
) -> None:
    """Hand every piece of the result, and of the training state that it keeps, to `put`, several tensors at a time, the largest first
    so that none is left for the end alone."""
    jobs = [(WEIGHTS, spec) for spec in operation.outputs(parents)] + [(stem, spec) for stem, specs in state.items() for spec in specs]
    jobs.sort(key=lambda job: -job[1].nbytes)
    total, done = sum(spec.nbytes for _, spec in jobs), 0
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
        raise MismatchError(f"'{name}' holds {first.dtype} values that differ between the inputs, and such values cannot be combined.")
