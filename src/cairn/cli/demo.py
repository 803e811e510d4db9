"""cairn demo"""

from pathlib import Path
from typing import Annotated

from cairn.cli import console, places


def demo(
    out: Annotated[Path, places.local("Where the demo's run and picture go; must not exist.", "-o", "--out")] = Path("runs/demo"),
    json: console.Json = False,
) -> None:
    """Train, kill, resume, measure, average: five minutes.

    Shows on this machine that a killed run goes on bit for bit, and that every checkpoint opens in transformers.
    """
    from cairn.studies.demo import demo as show

    result = show(out, say=console.say if json else print)
    if json:
        console.emit(result)
