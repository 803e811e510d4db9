"""Distillation: learn what a teacher finds probable, beside what the text says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from cairn.catalog import Paper, register
from cairn.training.objectives import Loss
from cairn.training.objectives.causal_lm import CausalLM

if TYPE_CHECKING:
    import torch
    from torch import nn


@register("objective", "distillation", paper=Paper("Distilling the Knowledge in a Neural Network", "arXiv:1503.02531"))
class Distillation(CausalLM):
    """Cross-entropy and the divergence from a teacher's predictions, of the recipe's `teacher` (section 2)."""

    teachers: ClassVar[tuple[str, ...]] = ("teacher",)
    needs_teachers: ClassVar[bool] = True

    z_loss: float = Field(0.0, ge=0, le=0)
    """Not with a teacher."""
    share: float = Field(0.5, ge=0, le=1)
    """Weight of the divergence; the cross-entropy has the rest."""
    temperature: float = Field(1.0, gt=0)
    """Both predictions are flattened by it before they are compared."""

    def loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Loss:
        from cairn.training.distillation import distilled

        losses, entropy, apart = distilled(self.taught(batch, "teacher"), self.logits(model, batch), batch["targets"], self.share, self.temperature)
        weights = batch["weights"]
        return Loss((losses * weights).sum(), {"cross_entropy": (entropy * weights).sum(), "divergence": (apart * weights).sum()})

    @property
    def separable(self) -> bool:
        return True

    def token_losses(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from cairn.training.distillation import distilled

        return distilled(self.taught(batch, "teacher"), self.logits(model, batch), batch["targets"], self.share, self.temperature)[0]
