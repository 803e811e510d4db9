"""cairn fork"""

from pathlib import Path
from typing import Annotated

import typer

from cairn.cli import console, places
from cairn.cli.train import report, tell
from cairn.errors import InputError


def fork(
    checkpoint: Annotated[str, places.anywhere("The checkpoint (or run) from which to branch off.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", help="Another recipe, and options.")] = None,
    run: Annotated[Path | None, places.local("The new run directory.", "--run", "--run-directory")] = None,
    fresh: console.Fresh = None,
    base: console.Base = None,
    dry_run: console.DryRun = False,
    device: console.Device = None,
    json: console.Json = False,
) -> None:
    """Begin a new run from a checkpoint, ours or an open one.

    What is changed on purpose is recorded.
    """
    from cairn.training.run import fork as start
    from cairn.training.run import recipe_to_fork

    if run is None and not dry_run:
        raise InputError("Name the new run directory with --run DIR.")
    given = list(settings or [])
    recipe = places.checked_name(given.pop(0)) if given and not places.is_setting(given[0]) else None
    asked = recipe_to_fork(checkpoint, given, recipe=recipe)
    if run is None or dry_run:
        tell(asked, "h100", 1, json)
        return
    if console.launched_instead(asked.parallel):
        return
    finished = start(checkpoint, run, given, recipe=recipe, base=base, fresh=[part.value for part in fresh or []], device=device, quiet=False)
    report(finished.path, json)
