"""cairn ablate-sources"""

from pathlib import Path
from typing import Annotated

import typer

from cairn.cli import console, places
from cairn.errors import InputError


def ablate_sources(
    checkpoint: Annotated[str, places.anywhere("The checkpoint from which every last phase begins.")],
    settings: Annotated[list[str], typer.Argument(metavar="NAME=WEIGHT... [train.KEY=VALUE]...", help="Mixture of the phase; options of the runs.")],
    folder: Annotated[Path, places.local("Where the runs are kept and found again.", "--folder")],
    tokens: Annotated[str | None, typer.Option(help="Length of the phase; default: to the end of the checkpoint's run.")] = None,
    drop: Annotated[str | None, typer.Option(help="Only these sources are left out, separated by commas.")] = None,
    orders: Annotated[int, typer.Option(help="Orders of the data in which the whole mixture is run, to know the noise.")] = 3,
    sequences: Annotated[int, typer.Option(help="Held-out windows that are measured, shared among the sources.")] = 256,
    device: console.Device = None,
    json: console.Json = False,
) -> None:
    """Say what each source of data is worth.

    The last phase of training is repeated without it.
    """
    from cairn.selection.final_phase import ablate_sources as value

    weights, overrides = _asked(settings)
    chosen = drop.split(",") if drop else None
    words = {"tokens": tokens, "drop": chosen, "orders": orders, "sequences": sequences, "overrides": overrides}
    found = value(checkpoint, weights, folder, **words, device=device, say=console.say)  # type: ignore[arg-type]
    if json:
        console.emit(found.plain())
        return
    measured = list(found.noise)
    rows = [(name, *(f"{row[m]:+.4f}{' *' if found.counts[name][m] else ''}" for m in measured)) for name, row in found.effects.items()]
    console.table(("left out", *measured), [*rows, ("(noise)", *(found.noise[m] for m in measured))])


def _asked(settings: list[str]) -> tuple[dict[str, float], list[str]]:
    weights: dict[str, float] = {}
    overrides = []
    for setting in settings:
        name, equals, value = setting.partition("=")
        if name.startswith("train.") and equals:
            overrides.append(setting.removeprefix("train."))
            continue
        try:
            weights[name] = float(value)
        except ValueError:
            raise InputError(f"'{setting}' is not NAME=WEIGHT or train.KEY=VALUE.") from None
    return weights, overrides
