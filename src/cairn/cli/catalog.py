"""cairn catalog"""

from typing import Annotated, Any

import typer

from cairn.cli import console


def catalog(
    name: Annotated[
        str | None, typer.Argument(metavar="[KIND|NAME]", help="A kind or group (operation, ingredient, measurement, study, ...), or a method.")
    ] = None,
    json: console.Json = False,
) -> None:
    """List every method, or the options of one.

    With the paper of each.
    """
    from cairn import catalog as methods

    groups = {kind.group for kind in methods.KINDS.values()}
    if name is not None and name not in groups and name not in methods.KINDS:
        _show(name, json)
        return
    rows = [_row(entry) for entry in methods.entries(name)]
    if json:
        console.emit(rows)
    else:
        console.table(("group", "kind", "name", "what it does", "paper"), [[*list(row.values())[:4], "; ".join(row["papers"]) or "-"] for row in rows])


def _show(name: str, json: bool) -> None:
    """The methods of a name with their options and defaults."""
    from dataclasses import asdict

    from cairn import catalog as methods
    from cairn.describing import described

    found = [(_row(entry), described(entry.implementation)) for entry in methods.named(name)]
    if json:
        console.emit([row | {"options": [asdict(option) for option in options]} for row, options in found])
        return
    for row, options in found:
        print(f"{row['kind']} {row['name']}: {row['summary']}")
        for paper in row["papers"]:
            print(f"  {paper}")
        print()
        if options:
            console.table(("option", "type", "default", "what it says"), [(o.name, o.type, o.default or "(must be given)", o.what or "-") for o in options])
        else:
            print("It has no options.")
        print()


def _row(entry: Any) -> dict[str, Any]:
    papers = [f"{paper.title} {paper.reference}".strip() for paper in entry.papers]
    return {"group": entry.group, "kind": entry.kind, "name": entry.name, "summary": entry.summary, "papers": papers}
