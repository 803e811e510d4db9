"""cairn claim"""

import inspect
from typing import Annotated

import typer

from cairn.cli import console, places
from cairn.errors import InputError, suggestion


def claim(
    checkpoint: Annotated[str, places.anywhere("A checkpoint, or a run: then all its checkpoints.")],
    metric: Annotated[str, typer.Argument(help="What the number is: accuracy, loss, ...")],
    value: Annotated[float, typer.Argument(help="The number.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="dataset= split= revision= n= stderr= claimed_by=")] = None,
    task: Annotated[str | None, typer.Option(help="The protocol: a measurement; its options as task.KEY=VALUE.")] = None,
    json: console.Json = False,
) -> None:
    """Register a number that somebody claims.

    With its protocol, `cairn audit claims` can measure it again.
    """
    from cairn.options import override
    from cairn.registry.statements import claim as register

    asked = override({"task": {"name": task}} if task else {}, settings or [])
    known = {name for name in inspect.signature(register).parameters if name not in ("source", "metric", "value")}
    if unknown := [key for key in asked if key not in known]:
        raise InputError(f"claim: unknown key '{unknown[0]}'.{suggestion(unknown[0], known)}")
    made = register(checkpoint, metric, value, **asked).model_dump(mode="json", exclude_defaults=True)
    console.emit(made) if json else console.values(made)
