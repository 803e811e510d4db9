"""cairn trajectory"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cairn.cli import console, places


def trajectory(
    sources: Annotated[list[str], places.anywhere("Measured runs, or result files of lm-evaluation-harness (a file, a folder, a zip).")],
    tasks: Annotated[str | None, typer.Option(help="Only these tasks, separated by commas.")] = None,
    reference: Annotated[list[str] | None, places.anywhere("Runs or result files that say what is usual at equal tokens.", "--reference")] = None,
    tokens_per_step: Annotated[int | None, typer.Option(help="Tokens of a step, for result files that count in steps.")] = None,
    plot: Annotated[Path | None, places.local("Draw the curves into this PNG file.", "--plot")] = None,
    csv: Annotated[Path | None, places.local("Write the tidy table into this file.", "--csv")] = None,
    json: console.Json = False,
) -> None:
    """Read measured runs as curves.

    Phases, smoothness, similarity over sizes, early ranking. Measures nothing.
    """
    from cairn.evaluation.analysis import trajectory as read

    wanted = set(tasks.split(",")) if tasks else None
    report = read(sources, tasks=wanted, reference=reference or [], tokens_per_step=tokens_per_step, plot=plot, csv=csv)
    if json:
        console.emit(asdict(report))
        return
    columns = ("run", "task", "metric", "checkpoints", "last", "phase", "onset_tokens", "tau", "drops", "verdict")
    console.table(columns, [[*(getattr(t, c) for c in columns[:7]), t.smoothness.tau, t.smoothness.drops, t.verdict] for t in report.tasks])
    if report.across:
        across = ("task", "metric", "runs", "similarity", "after_floor", "decision_step")
        console.table(across, [[getattr(t, column) for column in across] for t in report.across])
