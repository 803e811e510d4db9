"""Next-token prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from cairn.catalog import Paper, register
from cairn.training.objectives import Loss, Objective

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cairn.data.text.feed import Samples


@register("objective", "causal-lm", paper=Paper("Improving Language Understanding by Generative Pre-Training"))
class CausalLM(Objective):
    """Mean cross-entropy of each token given those before it, with optional z-loss."""

    z_loss: float = Field(0.0, ge=0)
    """Coefficient of log(Z)^2, which keeps the logits' normaliser near 1 ("PaLM", section 5). The loss then includes it, and
    metrics.jsonl has `cross_entropy` beside."""

    def arrays(self, samples: Samples) -> dict[str, np.ndarray]:
        inputs: dict[str, np.ndarray] = {"input_ids": samples.tokens[:, :-1], "targets": samples.tokens[:, 1:], "weights": samples.weights}
        if samples.documents is not None:
            inputs["documents"] = samples.documents[:, :-1]
        return inputs

    def loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Loss:
        from cairn.models import masks

        mask = masks.document(batch["documents"]) if "documents" in batch else None
        output = model(batch["input_ids"], mask=mask, targets=batch["targets"], weights=batch["weights"], z_loss=self.z_loss)
        if not self.z_loss:
            return Loss(output.loss)
        return Loss(output.loss, {"cross_entropy": (batch["weights"] * output.token_loss).sum()})

    @property
    def separable(self) -> bool:
        return self.z_loss == 0

    def token_losses(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from cairn.models import masks

        mask = masks.document(batch["documents"]) if "documents" in batch else None
        losses: torch.Tensor = model(batch["input_ids"], mask=mask, targets=batch["targets"], each=True).token_loss
        return losses
