"""cairn survival"""

from pathlib import Path
from typing import Annotated

import typer

from cairn.cli import console, places


def survival(
    nodes: Annotated[int, typer.Argument(help="Nodes of the job.")],
    settings: console.Settings = None,
    picture: Annotated[Path | None, places.local("Also draw the probability over time into this PNG.", "--picture")] = None,
    json: console.Json = False,
) -> None:
    """Say how likely a job loses work, and when to snapshot.

    Options are written group=8 parity=1 mtbf=2000 hours=24 ...
    """
    from cairn.checkpoint.memory import survival as calculator
    from cairn.options import override

    options = override({}, settings or [])
    figures = calculator.survival(nodes, **options)
    if picture is not None:
        calculator.draw(picture, nodes, **options)
    if json:
        console.emit(figures)
        return
    assumptions = figures.pop("assumptions")
    chances = {key.replace("_", " "): f"{value:.3g}" for key, value in figures.items() if key.startswith(("lost", "node"))}
    console.values({"groups of nodes": figures["groups"], **chances})
    for level in ("memory", "disk", "disk_alone"):
        found = figures[level]
        console.values({f"{level.replace('_', ' ')}: best interval": f"{found['interval_seconds']:.0f} s, overhead {found['overhead']:.2%}"})
    console.values({"memory and disk together": f"overhead {figures['overhead']:.2%}"})
    print("\nThese figures assume:\n" + "\n".join(f"- {sentence}" for sentence in assumptions))
