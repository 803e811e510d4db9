"""cairn catalog"""

from typing import Annotated

import typer

from cairn.cli import console


def catalog(
    kind: Annotated[str | None, typer.Argument(help="A kind or group: operation, ingredient, measurement, study, ...")] = None,
    json: console.Json = False,
) -> None:
    """List every method with its paper."""
    from cairn import catalog as methods

    entries = methods.entries(kind)
    rows = [
        {
            "group": entry.group,
            "kind": entry.kind,
            "name": entry.name,
            "summary": entry.summary,
            "papers": [f"{paper.title} {paper.reference}".strip() for paper in entry.papers],
        }
        for entry in entries
    ]
    if json:
        console.emit(rows)
    else:
        console.table(("group", "kind", "name", "what it does", "paper"), [[*list(row.values())[:4], "; ".join(row["papers"]) or "-"] for row in rows])
