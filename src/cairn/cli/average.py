"""cairn average"""

from typing import Annotated

import typer

from cairn.cli import console
from cairn.cli.merge import announce


def average(
    checkpoints: Annotated[list[str], typer.Argument(help="Checkpoints, or one run with --last.")],
    out: console.Out,
    last: Annotated[int | None, typer.Option(help="Average the newest N checkpoints of one run.")] = None,
    json: console.Json = False,
) -> None:
    """Average the weights of checkpoints."""
    from cairn.merge.combine import average as combine

    with console.Bytes("averaging") as progress:
        result = combine(checkpoints, out, last=last, progress=progress)
    announce(result, json)
