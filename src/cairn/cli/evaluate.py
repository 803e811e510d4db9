"""cairn evaluate"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cairn.cli import console, places


def evaluate(
    source: Annotated[str, places.anywhere("A checkpoint, or a run: then every checkpoint of it.")],
    settings: console.Settings = None,
    tasks: Annotated[
        str | None,
        places.named(
            "Measurements or task files (YAML), separated by commas; options as TASK.KEY=VALUE. Default: held-out for text, accuracy for labelled samples.",
            "--tasks",
            metavar="NAME,...",
        ),
    ] = None,
    csv: Annotated[Path | None, places.local("Write the tidy table into this file.", "--csv")] = None,
    plot: Annotated[Path | None, places.local("Draw the trajectory into this PNG file.", "--plot")] = None,
    device: console.Device = None,
    dtype: Annotated[console.Precision, typer.Option(help="What scores are computed in; bfloat16 takes half the memory and is another protocol.")] = (
        console.Precision.float32
    ),
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of one forward pass; lower it where memory is short.")] = None,
    json: console.Json = False,
) -> None:
    """Measure a checkpoint, or every checkpoint of a run.

    What was measured before costs nothing.
    """
    from cairn.checkpoint.format import read
    from cairn.evaluation.measure import default_task, with_options
    from cairn.evaluation.measure import evaluate as measure

    named = tasks.split(",") if tasks is not None else [default_task(read.open(source))]
    where = {"device": device, "dtype": dtype.value, "batch_tokens": batch_tokens}
    rows = measure(source, with_options(named, settings or []), progress=console.say, **where)  # type: ignore[arg-type]
    if plot is not None:
        from cairn.evaluation.trajectory import draw

        draw(rows, plot)
    if csv is not None:
        from cairn.evaluation.trajectory import write_csv

        write_csv(rows, csv)
    if json:
        console.emit([asdict(row) for row in rows])
        return
    unit = next((row.unit for row in rows), "tokens")
    columns = ("checkpoint", "units", "task", "metric", "value", "stderr", "interval", "n", "chance")
    console.table([unit if column == "units" else column for column in columns], [[getattr(row, column) for column in columns] for row in rows])
    from cairn.evaluation.trajectory import curves_in_words

    if curves := curves_in_words(rows):
        console.table(("run", "task", "metric", "curve", "first", "last"), curves)
