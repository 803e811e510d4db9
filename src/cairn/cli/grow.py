"""cairn grow"""

from typing import Annotated

import typer

from cairn import catalog
from cairn.cli import console, places
from cairn.cli.merge import announce
from cairn.errors import InputError


def grow(
    method: Annotated[str, typer.Argument(help=f"A growth ({catalog.listed('growth')}), or `when`: the guideline for when to grow.")],
    inputs: Annotated[list[str] | None, places.mixed("The checkpoint and the method's options.", metavar="CHECKPOINT [KEY=VALUE]...")] = None,
    out: Annotated[str | None, places.anywhere("Where the large checkpoint goes; must not exist.", "-o", "--out")] = None,
    check: Annotated[bool, typer.Option("--check", help="Load both models and say how far their logits differ.")] = False,
    parameters: Annotated[str | None, typer.Option("--params", help="For `when`: parameters of the large model, as 7B or 7e9.")] = None,
    tokens: Annotated[str | None, typer.Option(help="For `when`: tokens that a large model from scratch would be trained for.")] = None,
    factor: Annotated[float, typer.Option(help="For `when`: how many times larger.")] = 4.0,
    allow_non_finite: console.AllowNonFinite = False,
    device: console.Device = None,
    json: console.Json = False,
) -> None:
    """Make a larger checkpoint from a small one.

    The large one is there to train on.
    """
    given = inputs or []
    if method == "when":
        _when(parameters, tokens, factor, json)
        return
    from cairn.growth import enlarge
    from cairn.options import override

    checkpoints, settings = places.separated(given)
    if len(checkpoints) != 1 or out is None:
        raise InputError(f"Name one checkpoint and where the large one goes: cairn grow {method} CHECKPOINT key=value -o OUT.")
    with console.Bytes("growing") as progress:
        result = enlarge.grow(method, checkpoints[0], out, override({}, settings), device=device, allow_non_finite=allow_non_finite, progress=progress)
    if check:
        console.say(f"logits differ by at most {enlarge.difference(checkpoints[0], result, device=device):.2g}")
    announce(result, json)


def _when(parameters: str | None, tokens: str | None, factor: float, json: bool) -> None:
    from cairn.growth.when import when
    from cairn.options import Amount

    if parameters is None or tokens is None:
        raise InputError("The guideline needs the size of the large model and its tokens: cairn grow when --params 7B --tokens 2T.")
    try:
        large, budget = (Amount.parse(text.strip()).value for text in (parameters, tokens))
    except ValueError as error:
        raise InputError(str(error)) from None
    figures = when(large, budget, factor)
    console.emit(figures) if json else console.values(figures)
