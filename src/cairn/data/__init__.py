"""Data: where documents come from, how they become tokens, and in which order a model reads them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cairn.data.datasets import fetch, list_
    from cairn.data.text.tokens import prepare

__all__ = ["fetch", "list_", "prepare"]

_HOMES = {"fetch": "cairn.data.datasets", "list_": "cairn.data.datasets", "prepare": "cairn.data.text.tokens"}
"""What `cairn data` does, loaded when it is used."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cairn.data' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
