"""cairn trends"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cairn.cli import console, places


def trends(
    table: Annotated[Path, places.local("CSV with columns month, type, uploads, discussions.")],
    window: Annotated[int | None, typer.Option(min=3, help="Only the last so many months.")] = None,
    json: console.Json = False,
) -> None:
    """Say which types of models grow.

    And where uploads and discussion drift apart.
    """
    from cairn.registry.trends import trends as read

    found = asdict(read(table, window=window))
    if json:
        console.emit(found)
        return
    rows = [
        [e["type"], e["share"], *(f"{e[s]['value']:+.3f} ({e[s]['low']:+.3f} to {e[s]['high']:+.3f})" for s in ("uploads", "discussions")), e["flagged"]]
        for e in found["types"]
    ]
    console.table(("type", "share", "uploads a month (log)", "discussions a month (log)", "drifting apart"), rows)
    console.values({"rank correlation of uploads and discussions": found["spearman"]})
