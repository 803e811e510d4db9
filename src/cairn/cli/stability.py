"""cairn stability"""

from pathlib import Path
from typing import Annotated

import typer

from cairn.cli import console, places


def stability(
    runs: Annotated[list[str], places.anywhere("One run or several; of a run of several stages each is reported.")],
    window: Annotated[int, typer.Option(help="Steps whose mean and deviation a step is compared with.")] = 128,
    threshold: Annotated[float, typer.Option(help="Standard deviations from which a step is a spike.")] = 6.0,
    signals: Annotated[bool, typer.Option("--signals", help="Also open every checkpoint: growth exponents, largest attention logit.")] = False,
    sequences: Annotated[int, typer.Option(help="Held-out sequences on which signals are read.")] = 8,
    plot: Annotated[Path | None, places.local("Draw loss, gradient norm and signals into this PNG file.", "--plot")] = None,
    device: console.Device = None,
    json: console.Json = False,
) -> None:
    """Say how steadily a run trained.

    Spikes of loss and gradient norm, their growth, and what flows through its checkpoints.
    """
    from cairn.evaluation.audits import training_stability as stable

    found = [
        report
        for run in runs
        for report in stable.stability(run, window=window, threshold=threshold, signals=signals, sequences=sequences, device=device, progress=console.say)
    ]
    if plot is not None:
        console.say(f"drawn into {stable.draw(found, plot)}")
    if json:
        console.emit([report.plain() for report in found])
        return
    columns = ("run", "steps", "judged", "loss spikes", "gradient spikes", "gradient growth")
    console.table(columns, [(r.run, r.steps, r.loss.judged, r.loss.score, r.grad_norm.score, r.grad_norm_growth) for r in found])
    if signals:
        kinds = ("checkpoint", "step", "activation_growth", "gradient_growth", "largest_logit")
        console.table(("run", *kinds), [(r.run, *(getattr(signal, kind) for kind in kinds)) for r in found for signal in r.signals])
