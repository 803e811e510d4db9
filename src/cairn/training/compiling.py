"""Whether and how a model is compiled."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from cairn.training.context import TrainingContext

SAVING = {"cpu": 0.09, "cuda": 0.25}
"""Share of an eager step that compiling is expected to save. On a CPU it is what docs/benchmarks/train_step.md found, where
matrix products are most of a step; on a GPU, where launches and element-wise work weigh more, it is an estimate."""
COST = {"cpu": 45.0, "cuda": 60.0}
"""Seconds that compiling is expected to take."""


def compiled(module: torch.nn.Module) -> torch.nn.Module:
    """The module under torch.compile, for shapes that do not change."""
    return torch.compile(module, dynamic=False)  # type: ignore[return-value]


def pays(trainer: TrainingContext) -> bool:
    """Whether compiling this run saves more time than it takes, judged by one measured eager step and the steps to go.

    The gradient of that step is thrown away; nothing of the run changes. Needs a C++ compiler on a CPU.
    """
    if trainer.world.sharded:
        return False  # asked for by name only: what the hooks of a sharded model gain from it is not measured
    if trainer.world.device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return False
    steps = trainer.recipe.total_steps - trainer.progress.step
    micro_batches = trainer.micro_batches(trainer.progress.position)
    seconds = []
    for _ in range(2):  # the first one also pays for allocations
        began = time.perf_counter()
        trainer.gradients(micro_batches)
        trainer.optimizer.zero_grad(set_to_none=True)
        if trainer.world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    (slowest,) = trainer.world.sums([min(seconds) / trainer.world.replicas])
    return slowest * steps * SAVING[trainer.world.device.type] > COST[trainer.world.device.type]
