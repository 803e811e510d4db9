"""cairn study"""

from pathlib import Path
from typing import Annotated

import typer

from cairn.cli import console


def study(
    name: Annotated[str | None, typer.Argument(help="A study's name or the number of its card; without one, the list.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All studies.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Render the pages of the committed records; runs nothing.")] = False,
    evidence: Annotated[Path, typer.Option(help="Where records and pages go.")] = Path("docs/evidence"),
    work: Annotated[Path | None, typer.Option(help="Where runs go; default: the user's cache.")] = None,
    json: console.Json = False,
) -> None:
    """Reproduce a published finding at small scale, with a negative control."""
    from cairn.studies import runner

    if report:
        pages = runner.report(evidence)
        console.emit([str(page) for page in pages]) if json else [print(page) for page in pages]
        return
    if name is None and not every:
        rows = runner.listing()
        if json:
            console.emit(rows)
        else:
            console.table(("study", "card", "minutes", "paper"), [(row["name"], row["card"], row["minutes"], row["paper"]) for row in rows])
        return
    records = runner.study(None if every else name, evidence=evidence, work=work, progress=console.say)
    if json:
        console.emit([record.plain() for record in records])
    else:
        for record in records:
            print(record.text())
    if any(not record.holds_up for record in records):
        raise typer.Exit(1)
