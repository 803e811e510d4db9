"""cairn log"""

from typing import Annotated

import typer

from cairn.cli import console


def log(checkpoint: Annotated[str, typer.Argument(help="A checkpoint or a run.")], json: console.Json = False) -> None:
    """Draw the whole descent of a checkpoint: runs, resumes, forks, merges, imports, back to where it began."""
    from cairn.checkpoint.format.summary import log as descent

    entries = descent(checkpoint)
    if json:
        console.emit(entries)
        return
    from cairn.registry.descent import draw

    for line in draw(entries):
        print(line)
