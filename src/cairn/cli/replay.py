"""cairn replay"""

from dataclasses import asdict
from typing import Annotated

import typer

from cairn.cli import console, places


def replay(
    checkpoint: Annotated[str, places.anywhere("A checkpoint, or a run: then its newest one.")],
    parent: Annotated[list[str] | None, places.anywhere("Where a parent lies now, if not where lineage says.", "--parent")] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Largest distance, as a share of how far the step moved, that counts as the same.")] = 1e-3,
    device: console.Device = None,
    json: console.Json = False,
) -> None:
    """Make a checkpoint again and compare.

    It is made from its parents, and the same came out bit for bit, within a tolerance, or not.
    """
    from cairn.registry.replay import replay as again

    found = again(checkpoint, parents=parent or [], tolerance=tolerance, device=device, progress=console.say)
    if json:
        console.emit(asdict(found))
    else:
        console.values({key: value for key, value in asdict(found).items() if value not in ([], {}, None)})
    if not found.holds:
        raise typer.Exit(1)
