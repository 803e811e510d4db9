"""Where a benchmark ran and how its results are written: docs/benchmarks/NAME.json and NAME.md."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cairn.checkpoint.format import lineage

FOLDER = Path(__file__).parent.parent / "docs" / "benchmarks"


def machine() -> dict[str, Any]:
    """Processor, cores and memory."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"processor": names[0] if names else platform.processor(), "cores": os.cpu_count(), "memory_gib": round(memory, 1), "system": platform.platform()}


def commit() -> str | None:
    """The commit of the code, marked if it had changes."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False).stdout.strip()

    return (git("rev-parse", "--short=12", "HEAD") + (" with changes" if git("status", "--porcelain", "--", "../src", ".") else "")) or None


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median of the rounds' own ratios a / b: what else the machine does in a round falls on both."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def write(name: str, title: str, command: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], words: str, raw: dict[str, Any]) -> None:
    """Write the table with its circumstances, and every raw figure beside it; print the table."""
    where = {"machine": machine(), "versions": lineage.versions(), "date": datetime.now(UTC).date().isoformat(), "commit": commit(), "command": command}
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(
        json.dumps({"title": title, **where, "columns": list(columns), "rows": [list(r) for r in rows], "raw": raw}, indent=1) + "\n"
    )
    table = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *(f"| {' | '.join(_cell(value) for value in row)} |" for row in rows)]
    m = where["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in lineage.versions().items())
    place = f"{m['processor']}, {m['cores']} cores, {m['memory_gib']} GiB; {versions}; {where['date']}; commit {where['commit']}."
    text = "\n".join([f"# {title}", "", words, "", *table, "", f"`{command}`", "", place, "", f"Every figure: [{name}.json]({name}.json)", ""])
    (FOLDER / f"{name}.md").write_text(text)
    print("\n".join(table))


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
