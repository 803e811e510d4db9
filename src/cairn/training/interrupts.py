"""Ctrl-C and termination: the first one ends the run after its step, with a checkpoint; a second Ctrl-C ends it at once.

Several processes must agree on which step is the last. They say so to each other beside the computation, one step behind it: nobody waits.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from cairn.training.parallel import World


class Interrupts:
    """Whether somebody has asked the run to end; signals come here as long as the context lives."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._told, self._typed = threading.Event(), 0
        # A launcher hands an interrupt on to workers that the terminal has interrupted already.
        self._patience = 2 if world.size == 1 else 3
        self._before: dict[int, Any] = {}
        self._flag: torch.Tensor | None = None
        self._work: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._work is not None and kind in (None, KeyboardInterrupt, GeneratorExit):
            self._work.wait()  # everybody has asked as often as we have

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._typed += number == signal.SIGINT
        if self._typed >= self._patience:
            raise KeyboardInterrupt
        self._told.set()

    def asked(self) -> bool:
        """Whether this step is the last. Every process calls it once a step and hears the same."""
        if self._world.size == 1:
            return self._told.is_set()
        answer = False
        if self._work is not None:
            self._work.wait()
            answer = bool(self._flag)
        self._flag = torch.tensor([float(self._told.is_set())])
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._world.host_group, async_op=True)
        return answer
