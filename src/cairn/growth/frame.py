"""The frame of every growth: one checkpoint in, a larger one out, a few pieces of its tensors in memory at a time.

An operator says from which layer each layer comes and what the values of a tensor are; names, config, tokenizer, the recipe
of the larger model and the place in the data at which the small one stopped are kept here, once, for all of them. What comes
out is a checkpoint without moments: `cairn fork` trains it, with a fresh optimizer, on what the small model has not yet read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field

from cairn.checkpoint.format.compare import keys_that_differ
from cairn.checkpoint.format.layout import TensorSpec
from cairn.checkpoint.format.lazy import LazyTensor
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating.stream import WEIGHTS, Operation
from cairn.checkpoint.operating.values import FLOATS
from cairn.checkpoint.operating.walk import PIECE_ITEMS, widened
from cairn.errors import InputError, MismatchError
from cairn.growth.body import WIDTHS, AxisPosition, Body, body_of
from cairn.growth.layers import added, stacked
from cairn.randomness import seed_for


@dataclass(frozen=True)
class Target:
    """A tensor of the large model: where it belongs, from which of the small one's it comes, and whether its layer is an added one."""

    spec: TensorSpec
    place: AxisPosition
    source: str
    added: bool


class Growth(Operation):
    """Base of all growths: by default every layer of the deep model is a copy of one of the small model's."""

    catalog_kind: ClassVar[str] = "growth"
    sample_parents: ClassVar[int] = 1

    def layer_map(self, small: int) -> list[int]:
        """For each layer of the large model the small one's that it comes from."""
        return list(range(small))

    def widening(self) -> int:
        """How many times wider the large model is."""
        return 1

    @abstractmethod
    def values(self, target: Target, parent: Checkpoint, known: Any) -> Iterator[torch.Tensor]:
        """The values of a tensor of the large model as consecutive flat pieces."""

    def check(self, parents: Sequence[Checkpoint]) -> None:
        if len(parents) != 1:
            raise InputError(f"A growth makes one checkpoint larger; {len(parents)} were given.")
        coded = next((name for name, tensor in parents[0].tensors.items() if tensor.spec.dtype not in FLOATS and len(tensor.shape) > 1), None)
        if coded is not None:
            raise MismatchError(
                f"'{coded}' of {parents[0].path} holds {parents[0].tensors[coded].spec.dtype} values, which cannot be grown; give floating-point weights."
            )
        body = body_of(parents[0])
        if len(self.layer_map(body.layers)) == body.layers and self.widening() == 1:
            raise InputError(f"Nothing would grow: {parents[0].path} has {body.layers} layers; give {self._asked()}.")
        if self.widening() > 1:
            body.refuse_width()

    def config(self, parents: Sequence[Checkpoint]) -> dict[str, Any]:
        body = body_of(parents[0])
        config = body.deepened(self.layer_map(body.layers))
        return config | {key: config[key] * self.widening() for key in WIDTHS if config.get(key) is not None}

    def outputs(self, parents: Sequence[Checkpoint]) -> list[TensorSpec]:
        body, tensors = body_of(parents[0]), parents[0].tensors
        found = []
        for name, tensor in tensors.items():
            place = body.place(name)
            shape = self._shape(tensor, place)
            copies = [i for i, layer in enumerate(self.layer_map(body.layers)) if layer == place.layer] if place.layer is not None else [None]
            found += [TensorSpec(body.name(i, place.rest), tensor.spec.dtype, shape) for i in copies]
        return found

    def documents(self, parents: Sequence[Checkpoint]) -> dict[str, Any]:
        plain = parents[0].trainer
        if plain is None:
            return {}
        return {"trainer.json": plain | {"position": plain["position"] + self.sequences_used(parents[0]), "callbacks": self.callbacks(parents[0])}}

    def sequences_used(self, parent: Checkpoint) -> int:
        """Sequences of the training data that the growth itself reads."""
        return 0

    def callbacks(self, parent: Checkpoint) -> dict[str, Any]:
        """State of callbacks of training that the large model begins with; those of the small model begin afresh."""
        return {}

    def recipe(self, parents: Sequence[Checkpoint]) -> dict[str, Any] | None:
        """The parent's recipe with the sizes of the large model, or None where the parent has none."""
        from cairn.training.recipe import load

        options = parents[0].lineage.options if parents[0].lineage is not None else {}
        if "recipe" not in options:
            return None
        before, after = parents[0].config, self.config(parents)
        recipe = load(options["recipe"])
        known = type(recipe.model).model_fields
        sizes = {f"model.{key}": value for key, (_, value) in keys_that_differ(before, after).items() if key in known}
        return recipe.changed(sizes).plain()

    def changes(self, parents: Sequence[Checkpoint]) -> list[str]:
        differing = keys_that_differ(parents[0].config, self.config(parents))
        return [f"model.{key}: {old} -> {new}" for key, (old, new) in differing.items()]

    def pieces(self, spec: TensorSpec, parents: Sequence[Checkpoint]) -> Iterator[torch.Tensor]:
        yield from self.values(self.target(spec, parents[0]), parents[0], None)

    def parts(self, spec: TensorSpec, parents: Sequence[Checkpoint], known: Any) -> Iterator[tuple[str, str, torch.Tensor]]:
        for piece in self.values(self.target(spec, parents[0]), parents[0], known):
            yield WEIGHTS, spec.name, piece

    def target(self, spec: TensorSpec, parent: Checkpoint) -> Target:
        """What a tensor of the large model is made from."""
        body = body_of(parent)
        place = body.place(spec.name)
        if place.layer is None:
            return Target(spec, place, spec.name, False)
        order = self.layer_map(body.layers)
        return Target(spec, place, body.name(order[place.layer], place.rest), added(order)[place.layer])

    def _shape(self, tensor: LazyTensor, place: AxisPosition) -> tuple[int, ...]:
        if self.widening() == 1:
            return tensor.shape
        return tuple(size * (self.widening() if space else 1) for size, space in zip(tensor.shape, place.spaces, strict=True))

    def _asked(self) -> str:
        return " or ".join(f"{key} > 1" if key != "layers" else "more layers" for key in ("factor", "layers", "width") if key in type(self).model_fields)


class Deeper(Growth):
    """Base of growths that add layers."""

    factor: float | None = Field(None, ge=1)
    """How many times as many layers."""
    layers: int | None = Field(None, ge=1)
    """How many layers, instead of a factor."""

    def deep(self, small: int) -> int:
        """How many layers the large model has. Raises `InputError` for a number that is not whole or not larger."""
        if self.factor is not None and self.layers is not None:
            raise InputError("factor and layers say the same thing in two ways; give one of them.")
        if self.layers is not None:
            if self.layers < small:
                raise InputError(f"The model has {small} layers; layers={self.layers} would make it smaller.")
            return self.layers
        deep = small * (self.factor or 1)
        if deep != round(deep):
            raise InputError(f"factor={self.factor:g} times {small} layers is not a whole number; say how many with layers=N.")
        return round(deep)

    def layer_map(self, small: int) -> list[int]:
        return stacked(small, self.deep(small))


class DeeperAndWider(Deeper):
    """Base of growths that add layers, width, or both."""

    width: int = Field(1, ge=1)
    """How many times as wide: hidden size, MLP and heads; the size of a head stays."""

    def widening(self) -> int:
        return self.width


def row_blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of `columns` items that are small enough to be in hand."""
    step = max(1, PIECE_ITEMS // max(columns, 1))
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def rows_of(tensor: LazyTensor, begin: int, end: int) -> torch.Tensor:
    """Rows of a matrix (or items of a vector) in float32, read alone."""
    width = tensor.shape[1] if len(tensor.shape) > 1 else 1
    values = widened(tensor.flat(begin * width, end * width))
    return values.view(end - begin, width) if len(tensor.shape) > 1 else values


def drawn(shape: Sequence[int], spread: float, seed: int, *purpose: str | int) -> torch.Tensor:
    """Values from N(0, spread^2), float32, that depend on the seed and the purpose alone."""
    generator = torch.Generator("cpu").manual_seed(seed_for(seed, "grow", *purpose))
    return torch.empty(tuple(shape), dtype=torch.float32).normal_(0.0, spread, generator=generator)


def outputs_zeroed(target: Target, body: Body) -> bool:
    """Whether a tensor of an added layer must be zero for the layer to do nothing: what ends attention and MLP, or the norms behind them."""
    if body.output_norms:
        return target.place.rest in body.output_norms
    return target.place.part.partition(".")[0] in ("o", "down")
