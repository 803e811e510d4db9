"""cairn describe"""

from typing import Annotated

import typer

from cairn.cli import console, places


def describe(
    checkpoint: Annotated[str, places.anywhere("A checkpoint, or a run: then all its checkpoints.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="license=apache-2.0 intended_use='...'; null takes one back.")] = None,
    json: console.Json = False,
) -> None:
    """State license, use, limitations, citation.

    What only people know is kept beside the checkpoint, marked as stated.
    """
    from cairn.registry.statements import describe as state

    said = state(checkpoint, settings or []).model_dump(mode="json", exclude_defaults=True)
    console.emit(said) if json else console.values(said)
