"""cairn compress"""

from typing import Annotated

import typer

from cairn import catalog
from cairn.cli import console, places
from cairn.cli.merge import announce
from cairn.errors import InputError


def compress(
    method: Annotated[str, typer.Argument(help=f"A method ({catalog.listed('compression')}).")],
    inputs: Annotated[list[str], places.mixed("The checkpoint and the method's options.", metavar="CHECKPOINT [KEY=VALUE]...")],
    out: console.Out,
    device: console.Device = None,
    allow_non_finite: console.AllowNonFinite = False,
    json: console.Json = False,
) -> None:
    """Make a sparser or smaller checkpoint.

    Block by block, with what the model makes of calibration texts.
    """
    from cairn.compression.compress import compress as run
    from cairn.options import override

    checkpoints, settings = places.separated(inputs)
    if len(checkpoints) != 1:
        raise InputError(f"Name one checkpoint: cairn compress {method} CHECKPOINT calibration=CORPUS -o OUT.")
    with console.Bytes("compressing") as progress:
        result = run(method, checkpoints[0], out, override({}, settings), device=device, allow_non_finite=allow_non_finite, say=console.say, progress=progress)
    announce(result, json)
