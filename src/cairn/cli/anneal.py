"""cairn anneal"""

from pathlib import Path
from typing import Annotated

import typer

from cairn.cli import console, places
from cairn.cli.train import report
from cairn.errors import InputError


def anneal(
    checkpoint: Annotated[str, places.anywhere("The checkpoint (or run) from which to branch off.")],
    settings: console.Settings = None,
    tokens: Annotated[str, typer.Option(help="Length of the branch: tokens or steps.")] = "",
    run: Annotated[Path | None, places.local("The new run directory.", "--run", "--run-directory")] = None,
    final: Annotated[float, typer.Option(help="Share of the full learning rate at the end.")] = 0.05,
    device: console.Device = None,
    json: console.Json = False,
) -> None:
    """Let the learning rate fall on a branch, for use.

    The checkpoint itself stays what later training goes on from.
    """
    from cairn.continual.pretrain import anneal as start
    from cairn.continual.pretrain import settings_to_anneal
    from cairn.training.run import recipe_to_fork

    if run is None or not tokens:
        raise InputError("Name the new run directory with --run DIR and the length of the branch with --tokens, for example --tokens 5M.")
    asked = [*settings_to_anneal(checkpoint, tokens, final=final), *(settings or [])]
    if console.launched_instead(recipe_to_fork(checkpoint, asked).parallel):
        return
    report(start(checkpoint, run, tokens, settings or [], final=final, device=device, quiet=False).path, json)
