"""Next-token prediction."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, model_serializer

from cairn.catalog import Paper, register
from cairn.errors import InputError
from cairn.training.objectives import Loss, Objective, Setting

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cairn.data.text.feed import Samples
    from cairn.models.experts import Routed


@register("objective", "causal-lm", paper=Paper("Improving Language Understanding by Generative Pre-Training"))
class CausalLM(Objective):
    """Mean cross-entropy of each token given those before it, with optional z-loss; of a mixture of experts also the loss of its routers."""

    z_loss: float = Field(0.0, ge=0)
    """Coefficient of log(Z)^2, which keeps the logits' normaliser near 1 ("PaLM", section 5). The loss then includes it, and
    metrics.jsonl has `cross_entropy` beside."""
    router_loss: float | None = Field(None, ge=0)
    """Coefficient of the loss that spreads tokens evenly over the experts of a mixture ("Switch Transformers", equation 4); None: the
    model's `router_aux_loss_coef`. In training the loss then includes it, and metrics.jsonl has `cross_entropy`, `router_loss` (without its
    coefficient) and the `expert_load_max` and `expert_load_min` of any expert of any layer, where 1 is an even load."""
    router_balance: Literal["sequence", "micro-batch"] = "sequence"
    """Over what tokens are to be spread: within each sequence, or within each micro-batch of a process as transformers does. The latter alone
    makes what is computed depend on how a batch is cut into micro-batches."""

    @model_serializer(mode="wrap")
    def _without_routers(self, handler: Any) -> dict[str, Any]:
        """Without options of routers that say nothing, so that another objective may take the place of this one."""
        silent = {"router_loss": None, "router_balance": "sequence"}
        return {key: value for key, value in handler(self).items() if key not in silent or value != silent[key]}

    def fitted(self, setting: Setting) -> Self:
        """Also settles the coefficient of the routers' loss. Raises `InputError` where one is given and there are no experts."""
        own = getattr(setting.model, "router_aux_loss", None)
        if self.router_loss and own is None:
            raise InputError(f"objective.router_loss is for mixtures of experts, and a '{setting.model.model_type}' of these sizes has no experts.")
        return super().fitted(setting).model_copy(update={"router_loss": own if self.router_loss is None else self.router_loss})

    def arrays(self, samples: Samples) -> dict[str, np.ndarray]:
        inputs: dict[str, np.ndarray] = {"input_ids": samples.tokens[:, :-1], "targets": samples.tokens[:, 1:], "weights": samples.weights}
        if samples.documents is not None:
            inputs["documents"] = samples.documents[:, :-1]
        return inputs

    def loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Loss:
        from cairn.models import experts, masks

        mask = masks.document(batch["documents"]) if "documents" in batch else None
        tells = self.router_loss is not None and model.training
        routed: contextlib.AbstractContextManager[list[Routed]] = experts.recorded(model) if tells else contextlib.nullcontext([])
        with routed as routers:
            output = model(batch["input_ids"], mask=mask, targets=batch["targets"], weights=batch["weights"], z_loss=self.z_loss)
        total, parts = output.loss, {}
        if self.z_loss or routers:
            parts["cross_entropy"] = (batch["weights"] * output.token_loss).sum()
        if routers:
            # Of each sequence, by its weight: the mean over the global batch does not depend on how it is cut.
            uneven = (experts.balance(self._spread(routers)) * batch["weights"].sum(1 if self.router_balance == "sequence" else None)).sum()
            total = total + (self.router_loss or 0.0) * uneven
            parts |= {"router_loss": uneven, "expert_load": experts.loads(routers)}
        return Loss(total, parts)

    def _spread(self, routers: list[Routed]) -> list[Routed]:
        from cairn.models.experts import flattened

        return routers if self.router_balance == "sequence" else flattened(routers)

    def figures(self, parts: Mapping[str, Any]) -> dict[str, float]:
        plain = {name: part for name, part in parts.items() if name != "expert_load"}
        if "expert_load" not in parts:
            return plain
        even = [[load * len(layer) / sum(layer) for load in layer] for layer in parts["expert_load"]]
        return {**plain, "expert_load_max": max(map(max, even)), "expert_load_min": min(map(min, even))}

    @property
    def separable(self) -> bool:
        return self.z_loss == 0 and not self.router_loss

    def token_losses(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from cairn.models import masks

        mask = masks.document(batch["documents"]) if "documents" in batch else None
        losses: torch.Tensor = model(batch["input_ids"], mask=mask, targets=batch["targets"], each=True).token_loss
        return losses
