"""The texts that every machine has, as studies read them: of the standard library alone, which installed packages do not change."""

from __future__ import annotations

from typing import Any


def docs(max_bytes: str) -> dict[str, Any]:
    """Help topics and docstrings of the standard library."""
    return {"name": "python-docs", "part": "standard-library", "max_bytes": max_bytes}


def source(max_bytes: str) -> dict[str, Any]:
    """Source of the standard library."""
    return {"name": "python-source", "part": "standard-library", "max_bytes": max_bytes}
