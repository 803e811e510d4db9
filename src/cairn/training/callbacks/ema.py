"""An exponential moving average of the weights, kept beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cairn.catalog import Paper, register
from cairn.training.callbacks import Callback, Handler

if TYPE_CHECKING:
    import torch

    from cairn.training.context import Moment, TrainingContext


@register("callback", "ema", paper=Paper("Acceleration of Stochastic Approximation by Averaging", "doi:10.1137/0330046"))
class ExponentialMovingAverage(Callback):
    """Keep a moving average of the weights in every checkpoint (`ingredients.safetensors`, float32)."""

    decay: float = Field(0.999, gt=0, lt=1)

    def handler(self, trainer: TrainingContext) -> Handler:
        return _Average(self.decay, trainer)


class _Average(Handler):
    def __init__(self, decay: float, trainer: TrainingContext) -> None:
        import torch

        self.decay = decay
        self.parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().to(torch.float32, copy=True) for name, p in self.parameters.items()}

    def after_update(self, moment: Moment) -> dict[str, Any] | None:
        for name, parameter in self.parameters.items():
            average = self.average[name]
            average.lerp_(parameter.detach().to(average.dtype), 1 - self.decay)
        return None

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return self.average

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        for name, average in self.average.items():
            average.copy_(tensors[name])
