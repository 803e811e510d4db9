"""Checkpoints against each other: what differs between two, with what was measured of both; and a table of several."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cairn import statistics
from cairn.checkpoint.format import read
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating.diff import Difference
from cairn.evaluation.measure import stored_rows

if TYPE_CHECKING:
    from cairn.registry.index import Index


@dataclass
class CheckpointComparison(Difference):
    """What `cairn.checkpoint.operating.diff` finds, and `results`: what was measured of both by one protocol, second minus first with its 95 % interval.

    The interval is that of two independent measurements; the same items make it too wide, never too narrow (`cairn audit flips` pairs them).
    """

    results: list[dict[str, Any]] = field(default_factory=list)


def diff(a: str | Path | Checkpoint, b: str | Path | Checkpoint) -> CheckpointComparison:
    """Everything that differs between two checkpoints; streams through their weights and measures nothing anew."""
    from cairn.checkpoint.operating.diff import diff as compare

    first, second = (item if isinstance(item, Checkpoint) else read.open(item) for item in (a, b))
    found = compare(first, second)
    return CheckpointComparison(**asdict(found), results=results(first, second))


def results(a: Checkpoint, b: Checkpoint) -> list[dict[str, Any]]:
    """What was measured of both by the same protocol."""
    measured = [{(row.protocol, row.task, row.metric): row for row in stored_rows(str(item.path)) if row.digest == item.model_digest} for item in (a, b)]
    found = []
    for key, one in measured[0].items():
        if key in measured[1]:
            other = measured[1][key]
            ends = [statistics.interval(row.value, row.stderr, row.n) for row in (one, other)]
            low, high = statistics.difference(one.value, ends[0], other.value, ends[1])
            found.append(
                {"task": one.task, "metric": one.metric, "first": one.value, "second": other.value}
                | {"difference": other.value - one.value, "low": _known(low), "high": _known(high), "n": [one.n, other.n], "protocol": one.protocol}
            )
    return found


def interval(value: float, stderr: float | None, n: int | None = None) -> tuple[float | None, float | None]:
    """The 95 % interval of a figure as `cairn.statistics.interval` gives it; (None, None) where it is not known."""
    low, high = statistics.interval(value, stderr, n)
    return _known(low), _known(high)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def side_by_side(index: Index, keys: Sequence[str]) -> dict[str, Any]:
    """Several indexed checkpoints in one table: facts that differ, and results by (task, metric), one column for each."""
    facts = [index.facts(key) for key in keys]
    fields: dict[str, list[Any]] = {}
    for name in dict.fromkeys(name for each in facts for name in each):
        row = [each[name].value if name in each else None for each in facts]
        if name == "recipe":
            flat = [_flat(value or {}) for value in row]
            for key in dict.fromkeys(key for each in flat for key in each):
                fields[f"recipe.{key}"] = [each.get(key) for each in flat]
        else:
            fields[name] = row
    differing = {name: row for name, row in fields.items() if any(value != row[0] for value in row[1:])}
    scores: dict[tuple[str, str, str], list[Any]] = {}
    for place, key in enumerate(keys):
        for result in index.results(key):
            found = scores.setdefault((result["task"], result["metric"], result["protocol"]), [None] * len(keys))
            low, high = interval(result["value"], result["stderr"], result["n"])
            found[place] = result | {"low": low, "high": high}
    return {
        "differing": differing,
        "same": sorted(name for name in fields if name not in differing),
        "results": [{"task": t, "metric": m, "protocol": json.loads(p), "values": v} for (t, m, p), v in sorted(scores.items())],
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
