"""cairn resume"""

from pathlib import Path
from typing import Annotated

import typer

from cairn.cli import console, places
from cairn.cli.train import report


def resume(
    source: Annotated[str, places.anywhere("A run, or its newest checkpoint.")],
    settings: console.Settings = None,
    fresh: console.Fresh = None,
    run: Annotated[Path | None, places.local("The run's directory on this machine, where SOURCE is in a store.", "--run", "--run-directory")] = None,
    base: console.Base = None,
    exact: Annotated[bool, typer.Option("--exact", help="Refuse what may change bits: other libraries, another processor, kernels off.")] = False,
    device: console.Device = None,
    json: console.Json = False,
) -> None:
    """Continue a run exactly where it stopped.

    It goes on from its newest complete checkpoint.
    """
    from cairn.training.run import recipe_to_resume
    from cairn.training.run import resume as start

    if console.launched_instead(recipe_to_resume(source, settings or []).parallel):
        return
    finished = start(source, settings or [], fresh=[part.value for part in fresh or []], run=run, base=base, exact=exact, device=device, quiet=False)
    report(finished.path, json)
