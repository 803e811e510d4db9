"""Work on one set of items by all processes of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import nn


def share_of(count: int, model: nn.Module | None = None) -> NDArray[np.int64]:
    """Which of `count` items this process works on: every n-th, so that long ones are spread evenly.

    All of them where `model` is itself spread over the processes: a pass through it is then the work of all.
    """
    import torch.distributed as dist

    if not _divided(model):
        return np.arange(count)
    return np.arange(dist.get_rank(), count, dist.get_world_size())


def gathered(values: NDArray[np.float64], model: nn.Module | None = None) -> NDArray[np.float64]:
    """Values of which each process filled its own share and left zeros elsewhere, put together on all of them."""
    import torch
    import torch.distributed as dist

    if not _divided(model):
        return values
    total = torch.from_numpy(values)
    if dist.get_backend() == "nccl":
        total = total.cuda()
    dist.all_reduce(total)
    return total.cpu().numpy()


def _divided(model: nn.Module | None) -> bool:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return model is None or not any(isinstance(parameter, DTensor) for parameter in model.parameters())
