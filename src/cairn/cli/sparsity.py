"""cairn sparsity"""

from typing import Annotated

import typer

from cairn.cli import console


def sparsity(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint of a sparse run, or the run.")],
    json: console.Json = False,
) -> None:
    """Tell what the masks of a checkpoint keep, and what operations they save."""
    from cairn.training.sparsity import report

    figures = report(checkpoint)
    console.emit(figures) if json else console.values(figures)
