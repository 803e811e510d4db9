"""cairn ablate"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cairn.cli import console, places


def ablate(
    seed: Annotated[str, places.anywhere("The checkpoint of a run from which every branch goes on.")],
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=CORPUS... domain.NAME=CORPUS... [partition.NAME=PARTITION]... [train.KEY=VALUE]...",
            help="Parts, domains, the partitions that parts are units of, options of the branches.",
        ),
    ],
    pool: Annotated[Path, places.local("Where branches and scores are kept and found again.", "--pool")],
    steps: Annotated[int, typer.Option(help="Updates of each branch.")],
    size: Annotated[int, typer.Option(help="Parts of a mixture.")] = 2,
    validate: Annotated[int, typer.Option(help="Mixtures that are trained for real, to see how far merging can be trusted.")] = 0,
    sequences: Annotated[int, typer.Option(help="Windows of each domain that are measured.")] = 256,
    weighting: Annotated[Literal["micro", "macro"], typer.Option(help="Whether each part counts the same, or each partition.")] = "micro",
    optimizer: Annotated[Literal["carry", "fresh"], typer.Option(help="The optimizer's state at the beginning of a branch.")] = "carry",
    device: console.Device = None,
    json: console.Json = False,
) -> None:
    """Rank mixtures of data by merging.

    One branch a part instead of one training a mixture.
    """
    from cairn.merging.ablate import ablate as run
    from cairn.merging.ablate import asked

    wanted = asked(settings)
    found = run(
        seed,
        wanted.parts,
        wanted.domains,
        pool,
        steps=steps,
        size=size,
        validate=validate,
        overrides=wanted.overrides,
        sequences=sequences,
        partitions=wanted.partitions,
        weighting=weighting,
        optimizer=optimizer,
        device=device,
        say=console.say,
    )
    if json:
        console.emit(found.plain())
        return
    console.table(("mixture", "loss"), [(" + ".join(row["parts"]), row["loss"]) for row in found.ranking])
    if found.agreement:
        console.table(("proxy", *found.agreement["merge"]), [(proxy, *values.values()) for proxy, values in found.agreement.items()])
