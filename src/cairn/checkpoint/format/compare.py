"""A small comparison that reading, refusing and `diff` share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def keys_that_differ(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose plain values differ: `{key: (old, new)}`; a key that one side lacks counts as None there."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*old, *(k for k in new if k not in old)]:
            found |= keys_that_differ(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
        return found
    return {} if old == new else {prefix: (old, new)}
