"""Values as a page says them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from cairn.registry.web import charts


def number(value: Any) -> str:
    """A number in few letters, a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) and abs(value) < 100_000 else charts.number(value)


def size(value: Any) -> str:
    """Bytes for a person."""
    count = float(value or 0)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def short(digest: Any) -> str:
    """The beginning of a digest."""
    return str(digest or "–")[:12]


def when(value: Any) -> str:
    """A time, to the minute."""
    if isinstance(value, (int, float)):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M")
    return str(value or "–")[:16].replace("T", " ")


def plain(value: Any) -> str:
    """Any plain value on a line or a few."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return number(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items()) or "–"
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value) or "–"
    return value if isinstance(value, str) else json.dumps(value, default=str)
