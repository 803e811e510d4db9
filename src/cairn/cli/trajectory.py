"""cairn trajectory"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cairn.cli import console


def trajectory(
    sources: Annotated[list[Path], typer.Argument(help="Measured runs, or result files of lm-evaluation-harness (a file, a folder, a zip).")],
    tasks: Annotated[str | None, typer.Option(help="Only these tasks, separated by commas.")] = None,
    reference: Annotated[list[Path] | None, typer.Option(help="Runs or result files that say what is usual at equal tokens.")] = None,
    tokens_per_step: Annotated[int | None, typer.Option(help="Tokens of a step, for result files that count in steps.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves into this PNG file.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the tidy table into this file.")] = None,
    json: console.Json = False,
) -> None:
    """Read measured runs as curves: phases, smoothness, similarity over sizes, early ranking. Measures nothing."""
    from cairn.evaluation import analysis
    from cairn.evaluation.trajectory import draw, write_csv

    wanted = set(tasks.split(",")) if tasks else None
    rows = [row for row in analysis.table(sources, tokens_per_step) if wanted is None or row.task in wanted]
    report = analysis.analyse(rows, analysis.table(reference, tokens_per_step) if reference else ())
    if plot is not None:
        draw(rows, plot)
    if csv is not None:
        write_csv(rows, csv)
    if json:
        console.emit(asdict(report))
        return
    columns = ("run", "task", "metric", "checkpoints", "last", "phase", "onset_tokens", "tau", "drops", "verdict")
    console.table(columns, [[*(getattr(t, c) for c in columns[:7]), t.smoothness.tau, t.smoothness.drops, t.verdict] for t in report.tasks])
    if report.across:
        across = ("task", "metric", "runs", "similarity", "after_floor", "decision_step")
        console.table(across, [[getattr(t, column) for column in across] for t in report.across])
