"""Sparse pretraining: most entries of the matrices are zero and stay zero, by masks that are part of every checkpoint.

The gradient is masked before its norm is taken and before the optimizer sees it, so that moments stay zero where weights
do; weights are masked once more after each update. A fork without this callback trains all entries: dense fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from cairn.catalog import Paper, register
from cairn.errors import InputError, ResumeError
from cairn.options import Amount
from cairn.training.callbacks import Callback, Handler
from cairn.training.sparsity import CALLBACK, Distribution, kept, masked_shapes, moved_mask, random_mask

if TYPE_CHECKING:
    import torch

    from cairn.training.context import Moment, TrainingContext


@register(
    "callback",
    CALLBACK,
    paper=(
        Paper("SPDF: Sparse Pre-training and Dense Fine-tuning for Large Language Models", "arXiv:2303.10464", card=92),
        Paper("Rigging the Lottery: Making All Tickets Winners", "arXiv:1911.11134"),
    ),
)
class Sparse(Callback):
    """Keep a share of the entries of attention and MLP at exactly zero from the first step on (section 2)."""

    sparsity: float = Field(0.75, ge=0, lt=1)
    """Share of zeros in the masked matrices."""
    distribution: Distribution = "uniform"
    """The same share in every matrix, or by Erdos-Renyi (`erk`): the larger a matrix, the sparser."""
    update: Literal["static", "rigl"] = "static"
    """Whether the masks stay, or move to where the dense gradient is largest."""
    every: Amount = Amount(100, "steps")
    """Between two moves (rigl)."""
    until: Amount = Amount(75, "%")
    """Masks stay from here on (rigl)."""
    share: float = Field(0.3, gt=0, le=1)
    """Share of a mask that moves at first; it falls to 0 as a cosine until `until` (rigl)."""

    def needs(self) -> frozenset[str]:
        return frozenset({"tokens"})

    def handler(self, trainer: TrainingContext) -> Handler:
        return _Sparse(self, trainer)


class _Sparse(Handler):
    def __init__(self, options: Sparse, trainer: TrainingContext) -> None:
        import torch

        from cairn.checkpoint.format.parts import is_sharded, local_of, part_of

        self.options, self.trainer, self.moves = options, trainer, 0
        recipe = trainer.recipe
        if options.update == "rigl" and is_sharded(trainer.model.parameters()):
            raise InputError("Masks that move need whole matrices: use update=static with parallel.shard or parallel.tensor, or copies (parallel.data).")
        self.every = max(1, options.every.steps(recipe.training.batch, recipe.total_units))
        self.until = options.until.units(recipe.training.batch, recipe.total_units)
        shapes = masked_shapes(recipe.model)
        counts = kept(shapes, options.sparsity, options.distribution)
        self.parameters = {name: p for name, p in trainer.model.named_parameters() if name in shapes}
        self.masks: dict[str, torch.Tensor] = {}
        self.pending: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            mask = torch.empty_like(parameter, dtype=torch.bool, requires_grad=False)
            local_of(mask).copy_(torch.from_numpy(random_mask(name, shapes[name], counts[name], recipe.seed, part_of(name, parameter))))
            self.masks[name] = mask
        self._apply(self.parameters)

    def begin(self) -> None:
        from cairn.checkpoint.format.parts import local_of

        for name, parameter in self.parameters.items():
            if (local_of(parameter) * ~local_of(self.masks[name])).any():
                raise ResumeError(
                    f"'{name}' has weights where its mask has zeros: what this run begins from was not trained with these masks. "
                    "Train sparsely from scratch or from a sparse checkpoint, or take the callback 'sparse' out of the recipe."
                )

    def before_clip(self) -> None:
        progress, batch = self.trainer.progress, self.trainer.recipe.training.batch
        if self.options.update == "rigl" and (progress.step + 1) % self.every == 0 and progress.units + batch < self.until:
            share = self.options.share / 2 * (1 + math.cos(math.pi * progress.units / self.until))
            # The state may still be on its way to disk: masks, like weights, change after the update.
            self.pending = {name: moved_mask(p.detach(), self.masks[name], p.grad, share) for name, p in self.parameters.items() if p.grad is not None}
        self._apply({name: p.grad for name, p in self.parameters.items() if p.grad is not None})

    def after_update(self, moment: Moment) -> dict[str, Any] | None:
        if self.pending:
            for name, mask in self.pending.items():
                self.masks[name].copy_(mask)
                state = self.trainer.optimizer.state[self.parameters[name]]
                for value in state.values():
                    if getattr(value, "shape", None) == mask.shape:
                        value.mul_(mask)
            self.pending, self.moves = {}, self.moves + 1
        self._apply(self.parameters)
        return None

    def _apply(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set what the masks leave out to zero."""
        from cairn.checkpoint.format.parts import local_of

        for name, tensor in tensors.items():
            local_of(tensor).mul_(local_of(self.masks[name]))

    def state(self) -> dict[str, Any]:
        return {"moves": self.moves}

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return self.masks

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        from cairn.checkpoint.format.parts import local_of

        self.moves = state["moves"]
        for name, mask in self.masks.items():
            local_of(mask).copy_(local_of(tensors[name]))
