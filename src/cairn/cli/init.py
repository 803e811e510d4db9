"""cairn init"""

from pathlib import Path
from typing import Annotated

import typer

from cairn.cli import console, places


def init(
    source: Annotated[str, places.anywhere("A checkpoint (or run) to go on with, or a text: a file or a pattern of files.")],
    out: Annotated[Path, places.local("The file to write.", "--out", "-o")] = Path("recipe.yaml"),
    data: Annotated[list[str] | None, typer.Option(metavar="[NAME=]CORPUS", help="Of a checkpoint, what to go on with; may be given several times.")] = None,
    json: console.Json = False,
) -> None:
    """Write a starting recipe for a checkpoint or a text."""
    from cairn.cli.continue_ import named
    from cairn.training.starting import init as write

    path = write(source, out, named(data or []) or None)
    if json:
        console.emit({"recipe": str(path)})
        return
    begins = Path(source).is_dir() or "://" in source
    console.say(f"{path}; train with: cairn {f'fork {source} {path} --fresh optimizer' if begins else f'train {path}'} --run DIR")
