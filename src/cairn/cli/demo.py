"""cairn demo"""

from pathlib import Path
from typing import Annotated

import typer

from cairn.cli import console


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Where the demo's run and picture go; must not exist.")] = Path("runs/demo"),
    json: console.Json = False,
) -> None:
    """Train, kill, resume bit for bit, measure, average, open in transformers: five minutes on this machine."""
    from cairn.studies.demo import demo as show

    result = show(out, say=console.say if json else print)
    if json:
        console.emit(result)
