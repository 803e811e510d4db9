"""cairn log"""

from typing import Annotated

from cairn.cli import console, places


def log(checkpoint: Annotated[str, places.anywhere("A checkpoint or a run.")], json: console.Json = False) -> None:
    """Draw the whole descent of a checkpoint.

    Runs, resumes, forks, merges and imports, back to where it began.
    """
    from cairn.checkpoint.format.summary import log as descent

    entries = descent(checkpoint)
    if json:
        console.emit(entries)
        return
    from cairn.registry.descent import draw

    for line in draw(entries):
        print(line)
