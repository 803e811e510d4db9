"""cairn merge"""

from pathlib import Path
from typing import Annotated, Any

import typer

from cairn.cli import console


def merge(
    method: Annotated[str, typer.Argument(help="An operation; `cairn catalog operation` lists them.")],
    inputs: Annotated[list[str], typer.Argument(metavar="CHECKPOINT... [KEY=VALUE]...", help="Checkpoints and the method's options.")],
    out: console.Out,
    json: console.Json = False,
) -> None:
    """Combine checkpoints into a new one."""
    from cairn.merge.combine import merge as combine
    from cairn.options import override

    settings = [item for item in inputs if "=" in item and not Path(item).exists()]
    checkpoints = [item for item in inputs if item not in settings]
    with console.Bytes("merging") as progress:
        result = combine(method, checkpoints, out, override({}, settings), progress=progress)
    announce(result, json)


def announce(result: Any, json: bool) -> None:
    """Where a new checkpoint lies and what it is."""
    figures = {"path": str(result.path), "digest": result.digest, "parents": [parent.digest for parent in result.lineage.parents]}
    console.emit(figures) if json else print(f"{result.path}  {result.digest[:12]}  from {len(figures['parents'])} checkpoint(s)")
