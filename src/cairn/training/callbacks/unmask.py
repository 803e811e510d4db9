"""The mask of a grown checkpoint rises to 1 while the large model trains.

weight = value * m  where it was added,   m rises linearly from its first value to 1

The checkpoint of `cairn grow masked` holds the values behind the mask. An update is made on the weights as they are, and its
change is handed on to the values; the weights then follow the mask. Whatever checkpoint is written on the way holds the
weights that the model really has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cairn.catalog import Paper, register
from cairn.errors import InputError
from cairn.options import Amount
from cairn.training.callbacks import Callback, Handler

if TYPE_CHECKING:
    import torch

    from cairn.training.context import Moment, TrainingContext


@register("callback", "unmask", paper=Paper("Masked Structural Growth for 2x Faster Language Model Pre-training", "arXiv:2305.02869"))
class Unmask(Callback):
    """Raise the mask over the new parts of a model that `cairn grow masked` has made."""

    sample_start: ClassVar[Mapping[str, Any]] = {"kind": "growth", "name": "masked", "factor": 2, "width": 2}
    sample_changes: ClassVar[Mapping[str, Any]] = {"callbacks.0.length": "10 steps"}

    length: Amount = Amount(10, "%")
    """How long the mask takes to rise to 1, from the growth on."""

    def needs(self) -> frozenset[str]:
        return frozenset({"tokens"})

    def handler(self, trainer: TrainingContext) -> Handler:
        return _Unmask(self.length.units(trainer.recipe.training.batch, trainer.recipe.total_units), trainer)


class _Unmask(Handler):
    def __init__(self, length: int, trainer: TrainingContext) -> None:
        self.length, self.trainer = length, trainer
        self.parameters = dict(trainer.model.named_parameters())
        self.values: dict[str, torch.Tensor] = {}
        self.known: dict[str, Any] = {}

    def begin(self) -> None:
        if not self.known:
            raise InputError("The callback 'unmask' belongs to a run that is forked from a checkpoint of `cairn grow masked`; take it out of the recipe.")

    def after_update(self, moment: Moment) -> dict[str, Any] | None:
        if not self.values:
            return None
        before, first = self.known["mask"], self.known["from"]
        mask = min(1.0, first + (1 - first) * (moment.units - self.known["began"]) / self.length) if self.length else 1.0
        for name, values in self.values.items():
            self._follow(name, values, before, mask)
        self.known["mask"] = mask
        if mask == 1:
            self.values, self.known["ramps"] = {}, {}
        return {"unmask/mask": mask}

    def _follow(self, name: str, values: torch.Tensor, before: float, mask: float) -> None:
        """Hand an update's change on from the weight to the value behind the mask, and give the weight its new share of it."""
        from cairn.checkpoint.format.parts import local_of

        live, behind = local_of(self.parameters[name].detach()), local_of(values)
        behind += live - behind * self._share(name, before)
        live.copy_(behind * self._share(name, mask))

    def _share(self, name: str, mask: float) -> Any:
        """By what the values of a parameter are multiplied, on this rank."""
        import torch

        from cairn.checkpoint.format.parts import local_of, part_of

        ramp, parameter = self.known["ramps"][name], self.parameters[name]
        if "norm" in ramp:
            return math.sqrt(1 / ramp["norm"] + (1 - 1 / ramp["norm"]) * mask)
        part = part_of(name, parameter)
        share = torch.full_like(local_of(parameter.detach()), mask)
        share[tuple(slice(0, max(0, size - offset)) for size, offset in zip(ramp["box"], part.offset, strict=True))] = 1.0
        return share

    def state(self) -> dict[str, Any]:
        return dict(self.known)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return self.values

    def awaited(self, state: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
        import torch

        return {name: torch.empty_like(self.parameters[name], requires_grad=False) for name in state["ramps"]}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        self.known, self.values = dict(state), dict(tensors)
