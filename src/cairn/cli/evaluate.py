"""cairn evaluate"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cairn.cli import console


def evaluate(
    source: Annotated[str, typer.Argument(help="A checkpoint, or a run: then every checkpoint of it.")],
    settings: console.Settings = None,
    tasks: Annotated[
        str, typer.Option(help="Measurements or task files (YAML), separated by commas; KEY=VALUE options go to each that knows them as TASK.KEY=VALUE.")
    ] = "held-out",
    csv: Annotated[Path | None, typer.Option(help="Write the tidy table into this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the trajectory into this PNG file.")] = None,
    json: console.Json = False,
) -> None:
    """Measure a checkpoint or every checkpoint of a run; what was measured before costs nothing."""
    from cairn.evaluation.measure import evaluate as measure
    from cairn.evaluation.measure import with_options

    rows = measure(source, with_options(tasks.split(","), settings or []), progress=console.say)
    if plot is not None:
        from cairn.evaluation.trajectory import draw

        draw(rows, plot)
    if csv is not None:
        from cairn.evaluation.trajectory import write_csv

        write_csv(rows, csv)
    if json:
        console.emit([asdict(row) for row in rows])
        return
    columns = ("checkpoint", "tokens", "task", "metric", "value", "stderr", "n", "chance")
    console.table(columns, [[getattr(row, column) for column in columns] for row in rows])
    from cairn.evaluation.trajectory import curves_in_words

    if curves := curves_in_words(rows):
        console.table(("run", "task", "metric", "curve", "first", "last"), curves)
