"""Families whose layers choose experts for each token."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from cairn.models.config import ExpertSizes
from cairn.models.families import DecoderFamily


class RoutedFamily(DecoderFamily):
    """A decoder of pre-norm blocks with experts in place of MLPs. A family says by `expert_size` how large they are."""

    expert_names: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")
    wide_weights: ClassVar[bool] = False

    num_experts: int = Field(8, ge=1)
    num_experts_per_tok: int = Field(2, ge=1)
    """Experts that are chosen for each token."""
    norm_topk_prob: bool = False
    """Whether the weights of those that are chosen add up to 1."""
    router_aux_loss_coef: float = Field(0.001, ge=0)
    """Coefficient of the loss that spreads tokens evenly over experts."""

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok ({self.num_experts_per_tok}) is more than there are experts ({self.num_experts}).")
        return self

    @property
    def expert_size(self) -> int:
        """Inner size of an expert."""
        return self.intermediate_size

    @property
    def router_aux_loss(self) -> float | None:
        return self.router_aux_loss_coef if self.routed else None

    def experts_of(self, layer: int) -> ExpertSizes | None:
        return ExpertSizes(self.num_experts, self.num_experts_per_tok, self.expert_size, self.norm_topk_prob, self.expert_names, self.wide_weights)

    def to_hf(self) -> dict[str, Any]:
        # transformers 5 has one name for the number of experts, published files have the other.
        values = {key: value for key, value in super().to_hf().items() if key != "layer_types"}
        return {**values, "num_local_experts": self.num_experts, "output_router_logits": False}

    @classmethod
    def _also(cls, config: Any) -> dict[str, Any]:
        count = config.get("num_local_experts") or config.get("num_experts")
        return {**super()._also(config), **({} if count is None else {"num_experts": count})}
