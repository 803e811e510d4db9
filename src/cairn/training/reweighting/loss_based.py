"""Weights from the losses of a batch relative to each other: what is already known counts less.

h_i = (2 l_i - l_min - l_max) / (l_max - l_min)   in [-1, 1],      w = softmax(f(h) / r)

which maximises sum_i w_i f(h_i) + r * entropy(w). r is the temperature: large, and all count the same; small, and the
largest f takes all.

    linupper   f = min(h + 1, 1)      the lower half counts less, the upper half the same
    upper      f = (h + 1) / 2        the higher the more
    quadratic  f = 1 - h^2            both ends count less
    extremes   f = |h|                both ends count more
    uniform    f = 0
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field

from cairn.catalog import Paper, register
from cairn.options import Amount
from cairn.training.reweighting import Reweighting

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_RANGE = 1e-6
"""Losses that lie closer together than this count as equal."""

WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "linupper": lambda h: (h + 1).clamp(max=1),
    "upper": lambda h: (h + 1) / 2,
    "quadratic": lambda h: 1 - h.square(),
    "extremes": lambda h: h.abs(),
    "uniform": lambda h: h * 0,
}


def relative(losses: Tensor) -> Tensor:
    """Losses (M,) brought to [-1, 1] by the smallest and the largest of them; 0 where all are equal (section 4.1)."""
    low, high = losses.min(), losses.max()
    return ((losses - low) + (losses - high)) / (high - low).clamp(min=SMALLEST_RANGE)


def loss_weights(losses: Tensor, weighting: str = "linupper", temperature: float = 0.4) -> Tensor:
    """Weights (M,) that add up to 1 from mean losses (M,); no gradient passes (equation 5 and section 4.2)."""
    return (WEIGHTINGS[weighting](relative(losses.detach().double())) / temperature).softmax(0)


@register(
    "reweighting",
    "loss-based",
    paper=Paper("Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining", "arXiv:2502.06733", card=38),
)
class LossBased(Reweighting):
    """Each sequence counts by its loss relative to the other sequences of the global batch (section 4)."""

    weighting: Literal["linupper", "upper", "quadratic", "extremes", "uniform"] = "linupper"
    temperature: float = Field(0.4, gt=0)
    """r: how sharply the weights differ; at 100 they hardly do."""
    warmup: Amount = Amount(5, "%")
    """Equal weights for so long: the first losses say nothing yet."""

    def weights(self, losses: Tensor, tokens: int, batch: int) -> Tensor:
        return loss_weights(losses, "uniform" if tokens < self.warmup.units(batch) else self.weighting, self.temperature)

    def pinned(self, batch: int, total: int) -> Self:
        return self.model_copy(update={"warmup": Amount(self.warmup.units(batch, total), "")})
