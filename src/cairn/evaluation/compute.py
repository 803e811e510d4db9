"""How a model is computed with when it is measured: on which device, in which precision, and how much of the work at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cairn import device as devices
from cairn.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from cairn.checkpoint.format.read import Checkpoint

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Compute:
    """Settings of the machine, not of what is measured. In float32 they change no figure beyond its rounding; in bfloat16 the size of a pass
    does (a sum of a sentence may move by a nat), so that both are part of the protocol then.

    device: as `cairn.device.choose`; dtype: `float32` (weights are widened one by one as they are read) or `bfloat16` (half the memory);
    batch_tokens: tokens of one forward pass, in place of what each measurement takes. Raises `InputError` for settings that are not valid.
    """

    device: Any = None
    dtype: str = "float32"
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.device is None:  # models may be read by a thread of their own
            object.__setattr__(self, "device", devices.asked())
        else:
            devices.choose(self.device)  # refused also where every result is there already
        if self.dtype not in PRECISIONS:
            raise InputError(f"dtype is '{self.dtype}'; scores are computed in {' or '.join(PRECISIONS)}.")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise InputError(f"batch_tokens is {self.batch_tokens}; a forward pass has at least 1 token.")

    def model(self, checkpoint: Checkpoint) -> nn.Module:
        """The model of a checkpoint, ready to be measured; all that measure it use one request engine."""
        import torch

        from cairn.evaluation import engine

        model = checkpoint.model(dtype=getattr(torch, self.dtype), device=devices.choose(self.device))
        if checkpoint.tokenizer is not None:
            engine.share(model, checkpoint.tokenizer, budget_tokens=self.batch_tokens)
        return model

    def protocol(self, described: dict[str, Any]) -> dict[str, Any]:
        """The protocol of a measurement that is made so."""
        from cairn.evaluation.engine import BUDGET_TOKENS

        size = {} if self.dtype == "float32" else {"batch_tokens": self.batch_tokens or BUDGET_TOKENS}
        return {**described, "dtype": self.dtype, **size}
