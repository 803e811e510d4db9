"""cairn average"""

from typing import Annotated, Literal

import typer

from cairn.cli import console, places
from cairn.cli.merge import announce


def average(
    checkpoints: Annotated[list[str], places.anywhere("Checkpoints, or one run with --last.")],
    out: console.Out,
    last: Annotated[int | None, typer.Option(help="Average the newest N checkpoints of one run.")] = None,
    beta: Annotated[float | None, typer.Option(help="Exponential average that keeps this share of itself at each further checkpoint.")] = None,
    heads: Annotated[Literal["averaged", "shared", "first"], typer.Option(help="Average heads too, require equal ones, or take the first.")] = "averaged",
    moments: Annotated[Literal["dropped", "averaged"], typer.Option(help="The optimizer's state; averaged, training can go on from the result.")] = "dropped",
    batch_norm: Annotated[
        Literal["pooled", "last", "averaged"], typer.Option(help="Running statistics: of all data together, the last checkpoint's, or averaged like weights.")
    ] = "pooled",
    allow_non_finite: console.AllowNonFinite = False,
    json: console.Json = False,
) -> None:
    """Average the weights of checkpoints."""
    from cairn.merging.combine import average as combine

    with console.Bytes("averaging") as progress:
        method, own = ("ema", {"beta": beta}) if beta is not None else ("average", {})
        options = {**own, "heads": heads, "moments": moments, "batch_norm": batch_norm}
        result = combine(checkpoints, out, last=last, method=method, options=options, allow_non_finite=allow_non_finite, progress=progress)
    announce(result, json)
