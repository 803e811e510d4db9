"""Small comparisons that reading, refusing and `diff` share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cairn.checkpoint.format.read import Checkpoint


def keys_that_differ(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose plain values differ: `{key: (old, new)}`; a key that one side lacks counts as None there."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*old, *(k for k in new if k not in old)]:
            found |= keys_that_differ(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
        return found
    return {} if old == new else {prefix: (old, new)}


def tokenizer_digest(checkpoint: Checkpoint) -> str | None:
    """Digest of tokenizer.json, or None if the checkpoint carries no tokenizer."""
    entry = checkpoint.manifest.files.get("tokenizer.json")
    return entry.digest if entry is not None else None
