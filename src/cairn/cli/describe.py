"""cairn describe"""

from typing import Annotated

import typer

from cairn.cli import console


def describe(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint, or a run: then all its checkpoints.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="license=apache-2.0 intended_use='...'; null takes one back.")] = None,
    json: console.Json = False,
) -> None:
    """State what only people know: license, intended use, limitations, citation. Kept beside the checkpoint, marked as stated."""
    from cairn.registry.statements import describe as state

    said = state(checkpoint, settings or []).model_dump(mode="json", exclude_defaults=True)
    console.emit(said) if json else console.values(said)
