"""AdamW with the usual parameter groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from cairn.catalog import Paper, register
from cairn.training.optimizers import Optimizer, embeddings

if TYPE_CHECKING:
    import torch


@register("optimizer", "adamw", paper=Paper("Decoupled Weight Decay Regularization", "arXiv:1711.05101"))
class AdamW(Optimizer):
    """AdamW (algorithm 2), fused; weight decay on the parameters that `decay` says, by default on matrices alone."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    decay: Literal["matrices", "matrices-not-embeddings", "not-embeddings", "all"] = "matrices"
    """Which parameters decay: those with two or more dimensions (embedding and head included), the same without the
    embeddings (tables of tokens, positions and distances; a tied head is one of them), every one but these (OLMo 2: norms and biases decay
    too), or every one."""

    def build(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        import torch

        tables = embeddings(model)
        decayed: list[torch.nn.Parameter] = []
        plain: list[torch.nn.Parameter] = []
        for parameter in model.parameters():
            if parameter.requires_grad:
                (decayed if self._decays(parameter, parameter in tables) else plain).append(parameter)
        groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        groups = [group | {"base_lr": self.lr} for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)

    def _decays(self, parameter: torch.nn.Parameter, table: bool) -> bool:
        if "not-embeddings" in self.decay and table:
            return False
        return parameter.dim() >= 2 or self.decay in ("all", "not-embeddings")
