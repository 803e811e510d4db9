"""What of a model a run trains, and so what its checkpoints hold.

All of it; some parameters (`trainable`), where checkpoints hold the whole model and the optimizer's state of the parameters that train;
or an adapter beside frozen weights (`adapter`), where checkpoints hold the adapter alone and name their base by its digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from cairn.checkpoint.format import adapter as adapters
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.saving.modules import fill_all
from cairn.errors import InputError, ResumeError
from cairn.models.adapters.container import Adapted, attach
from cairn.models.adapters.targets import parameters_for
from cairn.randomness import seed_for

if TYPE_CHECKING:
    from cairn.training.recipe import Recipe


class Trained:
    """All parameters of a model, or those that `trainable` means; a checkpoint holds the whole model."""

    stem = "model"
    """The stem of the files that hold what is trained."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.model: Any = None
        self.base: Checkpoint | None = None
        """The checkpoint whose weights stay as they are, if what is trained lies beside them."""

    def enter(self, model: nn.Module) -> None:
        """Take the model as it is laid out over tensor-parallel processes, before it is cut into shards: freeze what does not train."""
        self.model = model
        if self.recipe.trainable:
            named = dict(model.named_parameters())
            chosen = set(parameters_for(named, self.recipe.trainable))
            for name, parameter in named.items():
                parameter.requires_grad_(name in chosen)

    def draw(self, seed: int) -> None:
        """Give what is added to the model its first values; the model has its own already."""

    def samples(self, step: int, numbers: np.ndarray, device: torch.device) -> None:
        """The next forward pass reads these samples of the global order."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """What a checkpoint holds, by the names that it has there."""
        return dict(self.model.named_parameters())

    def documents(self) -> dict[str, Any]:
        """The small files that belong to it."""
        dtype = self.recipe.checkpoint.dtype or str(next(iter(self.parameters().values())).dtype).removeprefix("torch.")
        return {"config.json": {**self.recipe.model.to_hf(), "dtype": dtype, "torch_dtype": dtype}}

    def lowered(self) -> dict[str, torch.dtype]:
        """In what each weight is written, where that is not as it is held."""
        asked = self.recipe.checkpoint.dtype
        dtype = getattr(torch, asked) if asked is not None else None
        return {name: dtype for name, each in self.parameters().items() if dtype is not None and each.is_floating_point() and each.dtype != dtype}

    def load(self, checkpoint: Checkpoint) -> None:
        """Fill it from a checkpoint; names and shapes must agree."""
        if checkpoint.is_adapter:
            raise ResumeError(f"{checkpoint.path} is an adapter and the recipe has none; fold it first: cairn adapt fold {checkpoint.path} -o OUT.")
        fill_all(self.parameters(), self._stored(checkpoint), f"weights of {checkpoint.path}")

    def lineage(self, directory: Path) -> dict[str, Any]:
        """What lineage says of it, besides the recipe."""
        return {}

    def _stored(self, checkpoint: Checkpoint) -> dict[str, Any]:
        return {name: tensor for name, tensor in checkpoint.tensors.items() if name not in self.recipe.model.restated}


class TrainedAdapter(Trained):
    """An adapter beside the frozen weights of `base`; a checkpoint holds the adapter alone, as it is held."""

    stem = adapters.STEM
    adapted: Adapted

    def lowered(self) -> dict[str, torch.dtype]:
        return {}

    def enter(self, model: nn.Module) -> None:
        self.model = model
        self.adapted = attach(model, self.recipe.adapter, seed=None)

    def draw(self, seed: int) -> None:
        self.adapted.draw(seed)

    def samples(self, step: int, numbers: np.ndarray, device: torch.device) -> None:
        if getattr(self.recipe.adapter, "dropout", 0.0):
            streams = {name: seed_for(self.recipe.seed, "adapter dropout", step, name) for name in self.adapted.matrices}
            self.adapted.samples(streams, torch.from_numpy(numbers).to(device))

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.adapted.named_parameters()

    def documents(self) -> dict[str, Any]:
        base = self._base()
        return {"config.json": base.config, adapters.CONFIG: self.adapted.config(), adapters.BASE: adapters.base_document(base)}

    def load(self, checkpoint: Checkpoint) -> None:
        own = {id(parameter) for parameter in self.parameters().values()}
        frozen = {name: parameter for name, parameter in self.model.named_parameters() if id(parameter) not in own}
        base = self._base()
        fill_all(frozen, self._stored(base), f"weights of {base.path}")
        if checkpoint.is_adapter:
            fill_all(self.parameters(), checkpoint.folder(self.stem), f"adapter of {checkpoint.path}")

    def lineage(self, directory: Path) -> dict[str, Any]:
        return {"base": adapters.base_hint(self._base(), directory)}

    def _base(self) -> Checkpoint:
        if self.base is None:
            raise InputError("An adapter is trained beside the weights of a checkpoint: cairn fork CHECKPOINT RECIPE --run DIR.")
        return self.base


def trained_by(recipe: Recipe) -> Trained:
    """What a recipe trains."""
    return TrainedAdapter(recipe) if recipe.adapter is not None else Trained(recipe)


def base_for(recipe: Recipe, source: Checkpoint | None) -> Checkpoint | None:
    """The base of what a recipe trains, when the run begins from `source`; None where nothing stays frozen beside it.

    Raises `InputError` where an adapter has no base or the recipe lacks the adapter that the source is, `NotFoundError` where the base of
    the source is not found.
    """
    if recipe.adapter is None:
        if source is not None and source.is_adapter:
            raise InputError(f"{source.path} is an adapter and the recipe has none; fold it first: cairn adapt fold {source.path} -o OUT.")
        return None
    if source is None:
        raise InputError("The recipe trains an adapter, which needs a checkpoint to stand beside: cairn fork CHECKPOINT RECIPE --run DIR.")
    return source.base if source.is_adapter else source


def begins_anew(recipe: Recipe, source: Checkpoint) -> bool:
    """Whether what is trained is not in the source, so that no optimizer state of it can be there."""
    return recipe.adapter is not None and not source.is_adapter


def counts(model: nn.Module) -> Mapping[str, int]:
    """Numbers of a model, and how many of them train."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return {"parameters": sum(size for size, _ in sizes), "trained": sum(size for size, trains in sizes if trains)}
