"""cairn search"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cairn.cli import console, places


def search(
    query: Annotated[list[str] | None, typer.Argument(help="Words, field:value, field>number, TASK:METRIC>number.")] = None,
    within: Annotated[Path | None, places.local("Only checkpoints under this folder.", "--within")] = None,
    file: Annotated[Path | None, places.local("The index to search; default: the user's own.", "--index")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many to show.")] = 50,
    json: console.Json = False,
) -> None:
    """Find indexed checkpoints.

    For example: `cairn search llama step>=100 held-out:loss<3`.
    """
    from cairn.registry.query import search as find

    found = find(" ".join(query or []), within=within, file=file, limit=limit)
    if json:
        console.emit(asdict(found))
        return
    columns = ("title", "family", "step", "tokens", "samples", "parameters", "act", "license", "digest", "path")
    console.table(columns, [[str(row[c])[:12] if c == "digest" else row[c] for c in columns] for row in found.rows])
    print(f"{found.total} of {found.indexed} checkpoints")
    for condition, count in found.left_out.items():
        print(f"  {condition} leaves out {count}")
