"""One rule for where a model computes: what was asked for, else the accelerator of this machine, else the processor."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cairn.errors import InputError

if TYPE_CHECKING:
    import torch


def choose(device: str | torch.device | None = None) -> torch.device:
    """The device that a command or a public function computes on.

    Parameters
    ----------
    device : a name such as `cpu`, `cuda`, `cuda:1` or `mps`; None takes the accelerator if there is one. Under torchrun each process
        takes the accelerator of its own local rank where no number is given.

    Returns
    -------
    The device, which exists.

    Raises
    ------
    InputError
        if torch knows no such device, or this machine has none.

    Examples
    --------
    >>> from cairn.device import choose
    >>> str(choose("cpu"))
    'cpu'
    """
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return _of_this_process(accelerator) if accelerator is not None else torch.device("cpu")
    there = f"this machine has cpu{f' and {accelerator.type} (0 to {_count() - 1})' if accelerator is not None else ' alone'}"
    try:
        asked = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"'{device}' is not a device; {there}.") from None
    if asked.type == "cpu" and not asked.index:
        return torch.device("cpu")
    if accelerator is None or asked.type != accelerator.type or (asked.index or 0) >= _count():
        raise InputError(f"There is no device '{asked}' to compute on; {there}.")
    return asked if asked.index is not None else _of_this_process(accelerator)


def _of_this_process(accelerator: torch.device) -> torch.device:
    """The accelerator with the number of this process on this machine."""
    import torch

    local, count = os.environ.get("LOCAL_RANK"), _count()
    if local is None or count <= 1:
        return torch.device(accelerator.type)
    return torch.device(accelerator.type, int(local) % count)


def _count() -> int:
    import torch

    return torch.accelerator.device_count()
