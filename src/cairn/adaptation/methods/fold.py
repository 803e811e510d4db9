"""Fold an adapter into its base: one checkpoint like any other, with the outputs that the two had together.

W' = W + change of the adapter, matrix by matrix, in float32 and rounded once to the dtype of the base.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from cairn.adaptation import Adaptation
from cairn.catalog import Paper, register
from cairn.checkpoint.format import adapter as files
from cairn.checkpoint.format.dtypes import CODES, DTYPES
from cairn.checkpoint.format.layout import TensorSpec
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating.stream import Context, copied
from cairn.errors import InputError, MismatchError
from cairn.models.adapters.container import adapter_of, merged, modules_of
from cairn.models.anatomy import Matrix


@register("adaptation", "fold", paper=Paper("LoRA: Low-Rank Adaptation of Large Language Models", "arXiv:2106.09685"))
class Fold(Adaptation):
    """Add what an adapter has learned to the weights of its base (section 4.1: no cost at inference)."""

    dtype: str | None = None
    """Of the result; None keeps that of the base. A base in bfloat16 rounds away most of a small change: float32 keeps it."""

    def check(self, parents: Sequence[Checkpoint]) -> None:
        """Parents are the base and the adapter."""
        if len(parents) != 2 or parents[0].is_adapter or not parents[1].is_adapter:
            raise InputError("Folding takes a base and an adapter of it, in this order.")
        if self.dtype is not None and self.dtype not in _FLOATS:
            raise InputError(f"dtype is one of {', '.join(_FLOATS)}, not '{self.dtype}'.")
        base, adapter = parents
        wanted = files.base_digest(adapter)
        if wanted is not None and wanted != base.model_digest:
            raise MismatchError(f"{adapter.path} was trained on the model {wanted[:12]}, and {base.path} is the model {base.model_digest[:12]}.")
        changes = _changes(adapter)
        for name, change in changes.weights(base).items():
            change.refuse_other_shape(base.tensors[name].shape, name, base)

    def carries(self, parents: Sequence[Checkpoint]) -> Sequence[Checkpoint]:
        """What was trained with another chat template brings that along; a tokenizer with more ids than the model has rows cannot come out."""
        base, adapter = parents
        own = adapter.tokenizer if adapter.read_file("tokenizer.json") is not None else None
        fits = own is None or own.vocab_size <= base.config.get("vocab_size", own.vocab_size)
        return parents if fits else parents[:1]

    def config(self, parents: Sequence[Checkpoint]) -> dict[str, Any]:
        config = dict(parents[0].config)
        return config if self.dtype is None else config | {key: self.dtype for key in ("dtype", "torch_dtype") if key in config}

    def outputs(self, parents: Sequence[Checkpoint]) -> list[TensorSpec]:
        specs = super().outputs(parents)
        if self.dtype is None:
            return specs
        return [TensorSpec(spec.name, _FLOATS[self.dtype] if DTYPES[spec.dtype].is_floating_point else spec.dtype, spec.shape) for spec in specs]

    def prepare(self, parents: Sequence[Checkpoint], context: Context) -> Any:
        return _changes(parents[1]).weights(parents[0])

    def pieces(self, spec: TensorSpec, parents: Sequence[Checkpoint]) -> Iterator[torch.Tensor]:
        raise NotImplementedError("folding knows the changes before it makes a tensor")

    def parts(self, spec: TensorSpec, parents: Sequence[Checkpoint], known: Any) -> Iterator[tuple[str, str, torch.Tensor]]:
        source = parents[0].tensors[spec.name]
        if spec.name not in known:
            yield from (("model", spec.name, piece) for piece in copied(source))
            return
        change: Change = known[spec.name]
        wide = source.load().to(torch.promote_types(source.dtype, DTYPES[spec.dtype]))
        yield "model", spec.name, merged(wide, change.delta(), change.matrix).reshape(-1)


class Change:
    """What an adapter adds to one matrix, made when it is asked for."""

    def __init__(self, adapter: Any, tensors: dict[str, Any], transposed: bool) -> None:
        self._adapter, self._tensors = adapter, tensors
        outputs, inputs = adapter.shape_of({own: tuple(tensor.shape) for own, tensor in tensors.items()})
        self.matrix = Matrix("", outputs, inputs, transposed=transposed)

    def delta(self) -> torch.Tensor:
        """(outputs, inputs), in the dtype of the adapter's numbers, at least float32."""
        layer = self._adapter.layer(self.matrix)
        with torch.no_grad():
            for own, tensor in self._tensors.items():
                parameter, loaded = layer.get_parameter(own), tensor.load()
                if parameter.shape != loaded.shape:
                    raise MismatchError(f"'{tensor.name}' is {tuple(loaded.shape)}, and adapter_config.json asks for {tuple(parameter.shape)}.")
                if loaded.dtype == torch.float64:
                    layer = layer.double()
                layer.get_parameter(own).copy_(loaded)
            delta: torch.Tensor = layer.delta()
        return delta

    def refuse_other_shape(self, shape: Sequence[int], name: str, base: Checkpoint) -> None:
        outputs, inputs = self.matrix.outputs, self.matrix.inputs
        if tuple(shape) != ((inputs, outputs) if self.matrix.transposed else (outputs, inputs)):
            raise MismatchError(f"The adapter belongs to another model: '{name}' of {base.path} is {tuple(shape)}, the adapter changes ({outputs}, {inputs}).")


class Changes:
    """What an adapter checkpoint adds, matrix by matrix."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, config = checkpoint, files.adapter_config(checkpoint)
        self.adapter = adapter_of(config)
        self.transposed = bool(config.get("fan_in_fan_out"))
        folder = checkpoint.folder(files.STEM)
        named = modules_of(self.adapter, folder)
        self.modules = {module: {own: folder[name] for own, name in names.items()} for module, names in named.items()}

    def weights(self, base: Checkpoint) -> dict[str, Change]:
        """The changes by the names of the weights in the base's files. Raises `MismatchError` for a module that the base does not have."""
        return {_weight_of(module, base): self.change(module) for module in self.modules}

    def change(self, module: str) -> Change:
        """What is added to the matrix of this module."""
        return Change(self.adapter, self.modules[module], self.transposed)


@functools.lru_cache(maxsize=4)
def _changes(checkpoint: Checkpoint) -> Changes:
    return Changes(checkpoint)


def _weight_of(module: str, base: Checkpoint) -> str:
    """The weight of a module in the files of a model, which may leave out the first part of its name."""
    name = f"{module}.weight"
    while name not in base.tensors:
        _, dot, name = name.partition(".")
        if not dot or name == "weight":
            raise MismatchError(f"The adapter belongs to another model: {base.path} has no '{module}.weight'.")
    return name


_FLOATS = {str(dtype).removeprefix("torch."): CODES[dtype] for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
