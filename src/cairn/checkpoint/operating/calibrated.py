"""Operations that see data: each block's inputs, block by block, in bounded memory, resumable.

A calibrated operation changes a model's blocks one after the other. For each block it sees what the block's matrices read while the
calibration texts pass through it, decides, and the texts pass through the changed block to become the next block's inputs. In memory are
the weights of one block, one micro-batch, and the hidden states of all texts where they fit a budget; beyond it they lie in files.

What a finished block has become is kept in a folder beside the result until that is published (`work.py`). The same command after a kill
finds it there and goes on with the block at which it stood.
"""

from __future__ import annotations

import ctypes
import importlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from blake3 import blake3
from pydantic import Field, PrivateAttr
from torch import Tensor

from cairn.checkpoint.format.layout import TensorSpec
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating.stream import WEIGHTS, Context, Operation, copied
from cairn.checkpoint.operating.work import States, Work
from cairn.device import choose
from cairn.errors import CairnError, InputError
from cairn.options import Bytes, Count

if TYPE_CHECKING:
    import numpy as np

Observe = Callable[[str, Tensor], None]
"""Told the stored name of a weight and what its matrix reads, (rows, sequence, inputs)."""


class Block(Protocol):
    """A block of a model, its weights in memory."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Its tensors by stored name."""

    def replace(self, changed: Mapping[str, Tensor]) -> None:
        """Give it other weights."""

    def forward(self, hidden: Tensor, observe: Observe | None = None) -> Tensor:
        """What it makes of hidden states; `observe` is told what each of its matrices reads."""


class Blocks(Protocol):
    """A model to be run block by block: `cairn.models.blockwise.Blockwise`."""

    def __len__(self) -> int: ...

    def inputs(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """What enters the first block, for each batch of token ids."""

    def opened(self, block: int) -> AbstractContextManager[Block]:
        """A block in memory."""


class Texts(Protocol):
    """A calibration set: `cairn.data.text.calibration.Calibration`."""

    ids: np.ndarray
    digest: str
    described: dict[str, Any]


class Visit:
    """What is done with one block: look at what its matrices read, then decide about its weights."""

    changes: ClassVar[bool] = True
    """Whether weights are changed; a visit that only looks needs one pass instead of two."""

    def observe(self, weight: str, inputs: Tensor) -> None:
        """See what a matrix reads, (rows, sequence, inputs); called for each matrix of the block and each micro-batch."""
        raise NotImplementedError

    def decide(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What to keep of the block after all texts have passed: its changed weights by name, or what was found out about it."""
        raise NotImplementedError


def walk(
    blocks: Blocks,
    ids: Tensor,
    visit: Callable[[int], Visit],
    work: Work,
    *,
    micro_batch: int = 8,
    memory: int = 2**30,
    stored: Mapping[str, torch.dtype] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Visit every block of a model in turn with the inputs that the texts give it.

    Parameters
    ----------
    blocks
        The model.
    ids
        Token ids (texts, length), int64.
    visit
        Makes the visit of the block of that number.
    work
        Where finished blocks are kept. Those that lie there already are not visited again.
    micro_batch
        How many texts pass at a time.
    memory
        Bytes of hidden states that may be held; more of them lie in the work folder, and a resumed walk need not make them again.
    stored
        The dtypes in which changed weights are stored; later blocks see them so rounded.
    progress
        Told (blocks done, blocks in all).
    """
    done, batches = work.finished(), ids.split(micro_batch)
    if done >= len(blocks):
        return
    kept = work.has_states(done)
    # A resumed walk passes two batches, the first and the last, to find how the blocks are called.
    entering = blocks.inputs([batches[0], batches[-1]] if kept else batches)
    states = _first_states(entering, len(ids), memory, work, done if kept else None)
    for number in range(done if kept else 0, len(blocks)):
        with blocks.opened(number) as block:
            if number < done:
                block.replace(work.kept(number))
                _pass(block, states, micro_batch, None)
            else:
                _visit(block, visit(number), states, work, micro_batch, stored or {}, last=number + 1 == len(blocks))
        _return_free_memory()
        if progress is not None:
            progress(number + 1, len(blocks))


def _return_free_memory() -> None:
    """Hand free memory back to the system, where the C library can: between blocks its heap would keep half a block each time."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _first_states(entering: Iterator[Tensor], texts: int, memory: int, work: Work, kept: int | None) -> States:
    """The hidden states that enter the block at which the walk begins."""
    first = next(entering)
    states = States((texts, *first.shape[1:]), first.dtype, memory, work, kept or 0)
    begin = 0
    for batch in _chained(first, entering):
        if kept is None:
            states.write(begin, batch)
            begin += len(batch)
    if kept is None:
        states.begin()
    return states


def _chained(first: Tensor, others: Iterator[Tensor]) -> Iterator[Tensor]:
    yield first
    yield from others


def _visit(block: Block, visit: Visit, states: States, work: Work, micro_batch: int, stored: Mapping[str, torch.dtype], *, last: bool) -> None:
    if not visit.changes:
        _pass(block, states, micro_batch, visit.observe)
        work.keep(visit.decide(block.weights))
        return
    for _, batch in states.batches(micro_batch):
        block.forward(batch, visit.observe)
    found = {name: values.to(stored.get(name, values.dtype)).cpu() for name, values in visit.decide(block.weights).items()}
    if not last:
        block.replace(found)
        _pass(block, states, micro_batch, None)
    work.keep(found)


def _pass(block: Block, states: States, micro_batch: int, observe: Observe | None) -> None:
    """Let all texts pass a block: what it makes of them enters the next one."""
    for begin, batch in states.batches(micro_batch):
        states.write(begin, block.forward(batch, observe))
    states.turn()


class Calibrated(Operation):
    """Base of operations that change the matrices of a model's blocks by what these read."""

    sample_parents: ClassVar[int] = 1
    sample_options: ClassVar[dict[str, Any]] = {"calibration": "python-docs", "sequences": 4, "sequence_length": 16, "micro_batch": 2}

    calibration: Any
    """The texts: a corpus as in a recipe (a name, a file or a mapping), or a stored calibration set (`.safetensors`)."""
    sequences: int = Field(128, ge=1)
    """How many texts."""
    sequence_length: Count | None = Field(None, ge=1)
    """Tokens of each; default: 2048, or as many as the model has positions for."""
    seed: int = Field(0, ge=0)
    """Seed of the choice of texts."""
    micro_batch: int = Field(8, ge=1)
    """How many texts pass a block at a time."""
    memory: Bytes = Field(2**30, ge=0)
    """Bytes of hidden states that may be held in memory; more lie in files beside the result while the operation runs."""

    _texts: Texts | None = PrivateAttr(None)

    @abstractmethod
    def visit(self, parent: Checkpoint, matrices: Mapping[str, Any], parts: Mapping[str, str]) -> Visit:
        """The visit of a block, given its matrices (`models.anatomy.Matrix`) and which parts they are (`q`, `down`, ...), by the names of their
        weights. `Visit.decide` returns the changed weights."""

    def check(self, parents: Sequence[Checkpoint]) -> None:
        if len(parents) != 1:
            raise InputError(f"This operation changes one checkpoint; {len(parents)} were given.")
        super().check(parents)
        self.texts(parents[0])

    def texts(self, parent: Checkpoint) -> Texts:
        """The calibration set for a model, prepared once. Raises `InputError` where it does not fit the model."""
        if self._texts is None:
            # By name: data and models stand a floor above this room.
            home = importlib.import_module("cairn.data.text.calibration")
            self._texts = home.calibration(self.calibration, parent, sequences=self.sequences, length=self.sequence_length, seed=self.seed)
        assert self._texts is not None
        return self._texts

    def facts(self, parents: Sequence[Checkpoint]) -> dict[str, Any]:
        texts = self.texts(parents[0])
        return {"calibration_set": {**texts.described, "digest": texts.digest}}

    def prepare(self, parents: Sequence[Checkpoint], context: Context) -> Work:
        """Walk through the blocks, or finish a walk that was cut short."""
        parent, texts = parents[0], self.texts(parents[0])
        device = choose(context.device)
        blocks = importlib.import_module("cairn.models.blockwise").Blockwise(parent, device=device)
        assert context.work is not None
        work = Work(context.work, self._key(parent, texts, str(device)))
        try:
            walk(
                blocks,
                torch.from_numpy(texts.ids),
                lambda number: self.visit(parent, blocks.matrices(number), blocks.parts(number)),
                work,
                micro_batch=self.micro_batch,
                memory=self.memory,
                stored={name: tensor.dtype for name, tensor in parent.tensors.items()},
                progress=lambda done, total: context.say(f"block {done} of {total}") if context.say is not None else None,
            )
        except BaseException as error:
            if isinstance(error, CairnError) or not work.finished():
                work.remove()
            elif context.say is not None and isinstance(error, KeyboardInterrupt):
                context.say(f"{work.finished()} of {len(blocks)} blocks are finished and kept in {work.folder}; the same command goes on from there.")
            raise
        finally:
            work.close()
        return work

    def pieces(self, spec: TensorSpec, parents: Sequence[Checkpoint]) -> Iterator[Tensor]:
        yield from copied(parents[0].tensors[spec.name])

    def parts(self, spec: TensorSpec, parents: Sequence[Checkpoint], known: Work) -> Iterator[tuple[str, str, Tensor]]:
        changed = known.tensors.get(spec.name)
        for piece in copied(changed) if changed is not None else self.pieces(spec, parents):
            yield WEIGHTS, spec.name, piece

    def _key(self, parent: Checkpoint, texts: Texts, device: str) -> str:
        """What decides the bits of the walk: only a walk of the same key is gone on with."""
        method = [type(self).__name__, self.model_dump(mode="json", exclude={"calibration", "memory"})]
        return blake3(json.dumps([*method, parent.model_digest, texts.digest, device, torch.__version__]).encode()).hexdigest()
