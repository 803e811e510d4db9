"""cairn study"""

from pathlib import Path
from typing import Annotated

import typer

from cairn.cli import console, places


def study(
    name: Annotated[str | None, typer.Argument(help="A study's name or the number of its card; without one, the list.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All studies.")] = False,
    recompute: Annotated[bool, typer.Option("--recompute", help="Compute verdicts again from the stored runs of the records; runs nothing.")] = False,
    control: Annotated[bool, typer.Option("--control", help="Run the negative control alone, beside the honest runs of the record.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Render the pages of the committed records; runs nothing.")] = False,
    front: Annotated[Path | None, places.local("A page that states the counts of verdicts, with --report.", "--front")] = None,
    evidence: Annotated[Path, places.local("Where records and pages go.", "--evidence")] = Path("docs/evidence"),
    work: Annotated[Path | None, places.local("Where runs go; default: the user's cache.", "--work")] = None,
    device: console.Device = None,
    json: console.Json = False,
) -> None:
    """Reproduce a published finding at small scale.

    With a negative control.
    """
    from cairn.studies import runner

    if report:
        pages = runner.report(evidence, front)
        console.emit([str(page) for page in pages]) if json else [print(page) for page in pages]
        return
    if name is None and not every and not recompute:
        rows = runner.listing()
        if json:
            console.emit(rows)
        else:
            console.table(("study", "card", "minutes", "paper"), [(row["name"], row["card"], row["minutes"], row["paper"]) for row in rows])
        return
    chosen = None if every else name
    if recompute:
        records = runner.recompute(chosen, evidence=evidence)
    elif control:
        records = runner.control(chosen, evidence=evidence, work=work, device=device, progress=console.say)
    else:
        records = runner.study(chosen, evidence=evidence, work=work, device=device, progress=console.say)
    if json:
        console.emit([record.plain() for record in records])
    elif recompute:
        console.table(("study", "verdict", "control"), [(r.name, r.verdict, f"fails {len(r.control_fails)} conditions") for r in records])
    else:
        for record in records:
            print(runner.told(record))
    if any(not record.counts for record in records):
        raise typer.Exit(1)
