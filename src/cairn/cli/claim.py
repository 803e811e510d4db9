"""cairn claim"""

from typing import Annotated

import typer

from cairn.cli import console


def claim(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint, or a run: then all its checkpoints.")],
    metric: Annotated[str, typer.Argument(help="What the number is: accuracy, loss, ...")],
    value: Annotated[float, typer.Argument(help="The number.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="dataset= split= revision= n= stderr= claimed_by=")] = None,
    task: Annotated[str | None, typer.Option(help="The protocol: a measurement; its options as task.KEY=VALUE.")] = None,
    json: console.Json = False,
) -> None:
    """Register a claim with its protocol, so that `cairn audit claims` can measure it again."""
    from cairn.options import override
    from cairn.registry.statements import claim as register

    values = {"metric": metric, "value": value, **({"task": {"name": task}} if task else {})}
    made = register(checkpoint, override(values, settings or [])).model_dump(mode="json", exclude_defaults=True)
    console.emit(made) if json else console.values(made)
