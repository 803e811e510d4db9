"""cairn sparsity"""

from typing import Annotated

from cairn.cli import console, places


def sparsity(
    checkpoint: Annotated[str, places.anywhere("A checkpoint of a sparse run, or the run.")],
    json: console.Json = False,
) -> None:
    """Say what the masks of a sparse checkpoint keep.

    And which operations they save.
    """
    from cairn.training.sparsity import sparsity as report

    figures = report(checkpoint)
    console.emit(figures) if json else console.values(figures)
