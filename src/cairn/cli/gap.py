"""cairn gap"""

from pathlib import Path
from typing import Annotated

import typer

from cairn.cli import console, places


def gap(
    runs: Annotated[list[Path], places.local("Continued runs whose callback `evaluate` measures held-out with by_source=true.")],
    old: Annotated[str, typer.Option(help="Name of the old source.")],
    new: Annotated[str, typer.Option(help="Name of the new source.")],
    task: Annotated[
        list[str] | None, typer.Option(help="An accuracy that the callback measures, such as known-names/import/accuracy; may be repeated.")
    ] = None,
    device: console.Device = None,
    json: console.Json = False,
) -> None:
    """Compare continued runs: what was lost, what was gained.

    Rise of the loss, forgetting, gain, stability gap, and which runs no other run beats. Trains nothing.
    """
    from cairn.evaluation.audits.gap import gap as compare

    found = compare(runs, old, new, task or [], device=device)
    if json:
        console.emit(found)
        return
    columns = ("name", "old_rise", "new_rise", "forgetting", "gain", "new_end")
    rows = [[*(row[c] for c in columns), *(row["gap"][c] for c in ("depth", "area", "recovery")), row["name"] in found["pareto"]] for row in found["runs"]]
    console.table((*columns, "depth", "area", "recovery", "pareto"), rows)
    if task:
        gaps = [(row["name"], figure, row["tasks"][figure]) for row in found["runs"] for figure in task]
        figures = ("start", "depth", "at", "recovery", "area")
        shown = [(name, figure, *([each[f] for f in figures] if each else ["not measurable"] + [None] * 4)) for name, figure, each in gaps]
        console.table(("name", "task", *figures), shown)
