"""One rule for where a model computes: what was asked for, else the accelerator of this machine, else the processor."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar, cast

from cairn.errors import InputError

if TYPE_CHECKING:
    import torch

F = TypeVar("F", bound=Callable[..., Any])

_asked: ContextVar[Any] = ContextVar("device", default=None)


def choose(device: str | torch.device | None = None) -> torch.device:
    """The device that a command or a public function computes on.

    Parameters
    ----------
    device : a name such as `cpu`, `cuda`, `cuda:1` or `mps`; None takes what `using` says, else the accelerator if there is one. Under
        torchrun each process takes the accelerator of its own local rank where no number is given.

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

    device = _asked.get() if device is None else device
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


def asked() -> Any:
    """What `using` says, for work that a thread of its own is to do; None where nothing was said."""
    return _asked.get()


@contextlib.contextmanager
def using(device: Any) -> Iterator[None]:
    """Whatever computes inside, and is not told otherwise, computes on `device`; None changes nothing. Raises `InputError` as `choose` does.

    Examples
    --------
    >>> from cairn.device import choose, using
    >>> with using("cpu"):
    ...     str(choose())
    'cpu'
    """
    if device is None:
        yield
        return
    choose(device)  # refused before anything begins
    token = _asked.set(device)
    try:
        yield
    finally:
        _asked.reset(token)


def computes(function: F) -> F:
    """Decorator of a function that trains, measures or runs models: its keyword `device` says where all of them compute, as in `choose`."""

    @functools.wraps(function)
    def inside(*arguments: Any, device: Any = None, **options: Any) -> Any:
        with using(device):
            return function(*arguments, device=device, **options)

    return cast(F, inside)


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
