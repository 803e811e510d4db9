"""Updates are made where loss and gradient norm are finite; whether they were, a GPU is asked one step later.

On a CPU nothing is ever waited for, so the question is asked at once. On a GPU the optimizer itself leaves the update out (`found_inf`, as under a
gradient scaler), and the answer is read before the next update begins: the device has long passed that point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cairn.training.context import Progress


@dataclass
class _Question:
    """Whether the update `step` was finite, on its way to the host."""

    step: int
    answer: torch.Tensor
    event: torch.cuda.Event | None
    loss: torch.Tensor
    norm: torch.Tensor


class FiniteGuard:
    """Makes an update or leaves it out."""

    def __init__(self, progress: Callable[[], Progress], leave_out: Callable[[int, float, float], object]) -> None:
        """`leave_out` is told step, loss and norm of an update that was not made; it may raise."""
        self._progress, self._leave_out = progress, leave_out
        self._question: _Question | None = None
        self.in_a_row = 0
        """Updates that were left out one after the other."""

    def step(self, optimizer: Any, loss: torch.Tensor, norm: torch.Tensor, *, later: bool | None = None) -> None:
        """One step of the optimizer where both are finite. `later`: the answer is read by the next `known`; default: on a GPU."""
        number = self._progress().step + 1
        if later is None:
            later = norm.is_cuda and getattr(optimizer, "_step_supports_amp_scaling", False)
        if later:
            finite = torch.isfinite(loss.to(norm.device)) & torch.isfinite(norm)
            optimizer.found_inf = (~finite).to(torch.float32)
            optimizer.step()
            self._question = _asked(number, finite, loss, norm)
        elif bool(torch.isfinite(loss)) and bool(torch.isfinite(norm)):
            optimizer.step()
            self.in_a_row = 0
        else:
            self._left(number, loss, norm)

    def known(self) -> None:
        """What has come of the last update is counted from here on."""
        question, self._question = self._question, None
        if question is None:
            return
        if question.event is not None:
            question.event.synchronize()
        if bool(question.answer):
            self.in_a_row = 0
        else:
            self._left(question.step, question.loss, question.norm)

    def _left(self, step: int, loss: torch.Tensor, norm: torch.Tensor) -> None:
        self.in_a_row += 1
        self._leave_out(step, float(loss), float(norm))


def _asked(step: int, finite: torch.Tensor, loss: torch.Tensor, norm: torch.Tensor) -> _Question:
    if not finite.is_cuda:
        return _Question(step, finite, None, loss, norm)
    answer = torch.empty((), dtype=torch.bool, pin_memory=True)
    answer.copy_(finite, non_blocking=True)
    return _Question(step, answer, torch.cuda.current_stream(finite.device).record_event(), loss, norm)
