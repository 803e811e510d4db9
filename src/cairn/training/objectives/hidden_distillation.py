"""Distillation of hidden states: what the blocks of a teacher compute, beside what the text says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field

from cairn.catalog import Paper, register
from cairn.errors import InputError, MismatchError
from cairn.randomness import seed_for
from cairn.training.objectives import Loss
from cairn.training.objectives.causal_lm import CausalLM

if TYPE_CHECKING:
    import torch
    from torch import nn

PAPERS = (
    Paper("FitNets: Hints for Thin Deep Nets", "arXiv:1412.6550"),
    Paper("TinyBERT: Distilling BERT for Natural Language Understanding", "arXiv:1909.10351"),
)


@register("objective", "hidden-distillation", paper=PAPERS)
class HiddenDistillation(CausalLM):
    """Cross-entropy and the distance from the hidden states of the recipe's `teacher`, block by block (FitNets 2.2, TinyBERT 3.2)."""

    teachers: ClassVar[tuple[str, ...]] = ("teacher",)
    needs_teachers: ClassVar[bool] = True

    z_loss: float = Field(0.0, ge=0, le=0)
    """Not with a teacher."""
    share: float = Field(0.5, ge=0, le=1)
    """Weight of the distance; the cross-entropy has the rest."""
    layers: list[tuple[int, int]] = []
    """Pairs of blocks, counted from 0: one of the student and the one of the teacher that it learns from. Left open, each block of the student
    learns from one of the teacher, evenly spaced."""
    projection: Literal["identity", "learned"] = "identity"
    """`learned`: a matrix for each pair brings the student's states to the teacher's width; it trains along and lies in the checkpoints.
    `identity`: both have one width."""
    normalised: bool = False
    """Whether each state is divided by its root mean square before they are compared: its direction alone counts."""

    def meeting(self, model: nn.Module, teachers: Mapping[str, nn.Module]) -> Self:
        from cairn.training.distillation import plain, uniform_layers, width_of

        teacher = teachers["teacher"]
        blocks = [len(plain(each).blocks()) for each in (model, teacher)]
        pairs = self.layers or uniform_layers(*blocks)
        for pair in pairs:
            for number, count, whose in zip(pair, blocks, ("student", "teacher"), strict=True):
                if not 0 <= number < count:
                    raise InputError(f"objective.layers: {list(pair)} names block {number} of the {whose}, which has the blocks 0 to {count - 1}.")
        mine, theirs = width_of(model), width_of(teacher)
        if self.projection == "identity" and mine != theirs:
            raise MismatchError(f"The student's hidden states have {mine} numbers and the teacher's {theirs}; set objective.projection=learned.")
        return self.model_copy(update={"layers": [tuple(pair) for pair in pairs]})

    def learned(self, model: nn.Module, teachers: Mapping[str, nn.Module], seed: int) -> dict[str, torch.Tensor]:
        from cairn.training.distillation import first_projection, width_of

        if self.projection == "identity":
            return {}
        wide, narrow = width_of(teachers["teacher"]), width_of(model)
        return {f"projection.{number}": first_projection(seed_for(seed, "projection", number), wide, narrow) for number in range(len(self.layers))}

    def said(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The states of the teacher's blocks, one pair after the other: (B, pairs, T, E)."""
        import torch

        from cairn.training.distillation import states_of

        _, states = states_of(model, [pair[1] for pair in self.layers], lambda whole: self.logits(whole, batch))
        return torch.stack(states, 1)

    def loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Loss:
        entropy, apart = self._parts(model, batch)
        weights = batch["weights"]
        total = (1 - self.share) * entropy + self.share * apart
        return Loss((total * weights).sum(), {"cross_entropy": (entropy * weights).sum(), "distance": (apart * weights).sum()})

    @property
    def separable(self) -> bool:
        return True

    def token_losses(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        entropy, apart = self._parts(model, batch)
        return (1 - self.share) * entropy + self.share * apart

    def _parts(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each position (B, T) the cross-entropy, and the mean over the pairs of the distance of states."""
        import torch
        import torch.nn.functional as F

        from cairn.training.distillation import state_distance, states_of

        taught = self.taught(batch, "teacher")
        logits, states = states_of(model, [pair[0] for pair in self.layers], lambda whole: self.logits(whole, batch))
        wide = logits if logits.dtype.itemsize == 8 else logits.float()
        entropy = F.cross_entropy(wide.transpose(1, 2), batch["targets"], reduction="none")
        each = [
            state_distance(mine, taught[:, number], batch.get(f"learned.projection.{number}"), normalised=self.normalised) for number, mine in enumerate(states)
        ]
        return entropy, torch.stack(each).mean(0)
