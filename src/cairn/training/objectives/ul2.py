"""UL2: a mixture of denoisers, each named by a mode token in front of what is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self

from pydantic import model_validator

from cairn.catalog import Paper, register
from cairn.data.text.denoising import Denoiser
from cairn.training.objectives import Loss
from cairn.training.objectives.denoising import SpanDenoising

if TYPE_CHECKING:
    import torch
    from torch import nn

PUBLISHED = (
    Denoiser(mode="[NLU]", rate=0.15, span=3),
    Denoiser(mode="[NLU]", rate=0.15, span=8),
    Denoiser(mode="[S2S]", rate=0.25, span=None),
    Denoiser(mode="[NLG]", rate=0.5, span=3),
    Denoiser(mode="[NLG]", rate=0.5, span=8),
    Denoiser(mode="[NLG]", rate=0.15, span=64),
    Denoiser(mode="[NLG]", rate=0.5, span=64),
)
"""Table 1 of the paper: two regular denoisers, the sequential one, four extreme ones, in equal parts. The sequential one splits anywhere,
as its preprocessor does; `split: fixed` is the table's quarter."""


@register("objective", "ul2", paper=Paper("UL2: Unifying Language Learning Paradigms", "arXiv:2205.05131", card=5))
class UL2(SpanDenoising):
    """A mixture of denoisers: each sequence gets one, drawn by weight, behind its mode token (section 3.1)."""

    denoisers: list[Denoiser] = list(PUBLISHED)
    """The rows of the mixture."""
    mode_tokens: bool = True
    """Whether the modes stand in front of what is read."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.denoisers:
            raise ValueError("denoisers: a mixture needs at least one.")
        return self

    def table(self) -> Sequence[Denoiser]:
        return self.denoisers if self.mode_tokens else [denoiser.model_copy(update={"mode": None}) for denoiser in self.denoisers]

    def special_tokens(self) -> list[str]:
        """The modes are reserved even where they are not used, so that models with and without them have the same shape."""
        return list(dict.fromkeys([*super().special_tokens(), *(d.mode for d in self.denoisers if d.mode is not None)]))

    def loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Loss:
        total, each = self.losses(model, batch)
        if "denoiser" not in batch:
            return Loss(total)
        sums = (each * batch["weights"]).sum(1)
        parts: dict[str, torch.Tensor] = {}
        for number in range(len(self.denoisers)):
            mine = batch["denoiser"] == number
            parts |= {f"{number}": (sums * mine).sum(), f"{number} weight": (batch["weights"].sum(1) * mine).sum()}
        return Loss(total, parts)

    def figures(self, parts: Mapping[str, float]) -> dict[str, float]:
        """The mean loss of each denoiser that the update had: those of different denoisers cannot be compared, nor their mean read as progress."""
        titles = [f"loss/{d.title}" if d.mode is None else f"loss/{d.mode.strip('[]')}/{d.title}" for d in self.table()]
        return {title: parts[f"{n}"] / parts[f"{n} weight"] for n, title in enumerate(titles) if parts.get(f"{n} weight")}
