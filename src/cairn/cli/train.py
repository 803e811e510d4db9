"""cairn train"""

from pathlib import Path
from typing import Annotated, Any

import typer

from cairn.cli import console, places
from cairn.errors import InputError


def train(
    recipe: Annotated[str, places.named("A recipe file, or the name of a shipped recipe.")],
    settings: console.Settings = None,
    run: Annotated[Path | None, places.local("The new run directory.", "--run", "--run-directory")] = None,
    go_on: Annotated[bool, typer.Option("--continue", help="If DIR holds this run already, go on from its newest checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what the run would cost and leave.")] = False,
    gpu: Annotated[str, typer.Option(help="GPU for which --dry-run estimates hours.")] = "h100",
    gpus: Annotated[int, typer.Option(help="How many of them.")] = 1,
    device: console.Device = None,
    json: console.Json = False,
) -> None:
    """Pretrain a model from scratch."""
    from cairn.training import recipe as recipes

    if dry_run:
        tell(recipes.load(recipe, settings or []), gpu, gpus, json)
        return
    if run is None:
        raise InputError("Name the new run directory with --run DIR.")
    from cairn.training.run import train as start

    loaded = recipes.load(recipe, settings or [])
    if console.launched_instead(loaded.parallel):
        return
    finished = start(loaded, run, go_on=go_on, device=device, quiet=False)
    report(finished.path, json)


def tell(recipe: Any, gpu: str, gpus: int, json: bool) -> None:
    """What a recipe would do and cost; of one with stages also each of them."""
    from cairn.training.estimate import estimate

    figures = estimate(recipe, gpu=gpu, gpus=gpus)
    if not recipe.stages:
        console.emit(figures) if json else console.values(figures)
        return
    from cairn.training.stages import estimates

    stages = estimates(recipe, gpu, gpus)
    if json:
        console.emit({"first": figures, "stages": stages})
        return
    console.values(figures)
    columns = ("stage", "from", "act", recipe.unit, "steps", "begins", "learning_rate", "sources", "seed", "estimated_hours")
    rates = [f"{row['learning_rate'][0]:.4e} to {row['learning_rate'][1]:.4e}" if "learning_rate" in row else "-" for row in stages]
    console.table(columns, [[*(row.get(c) if c != "learning_rate" else rate for c in columns)] for row, rate in zip(stages, rates, strict=True)])


def report(run: Path, json: bool) -> None:
    """What a finished run left behind; said by the first process alone."""
    import os

    from cairn.checkpoint.format import read
    from cairn.training.run import Run

    if os.environ.get("RANK", "0") != "0":
        return

    newest = Run(run).newest()
    if read.has_stages(run):
        from cairn.training.stages import progress

        stages = progress(run)
        told: dict[str, Any] = {"run": str(run), "checkpoint": str(newest.path), "digest": newest.digest}
        console.emit(told | {"stages": stages}) if json else console.values(told | {"stages": {row["stage"]: row["state"] for row in stages}})
        return
    last = Run(run).metrics()[-1:]
    figures = {"run": str(run), "checkpoint": str(newest.path), "step": newest.step, newest.unit: newest.units, "digest": newest.digest}
    figures |= {"loss": last[0]["loss"]} if last else {}
    console.emit(figures) if json else console.values(figures)
