"""cairn log"""

from typing import Annotated

import typer

from cairn.cli import console


def log(checkpoint: Annotated[str, typer.Argument(help="A checkpoint or a run.")], json: console.Json = False) -> None:
    """Walk back the lineage of a checkpoint."""
    from cairn.checkpoint.summary import log as descent

    entries = descent(checkpoint)
    if json:
        console.emit(entries)
        return
    for entry in entries:
        mark = "*" if entry["generation"] == 0 else "|"
        where = entry["path"] if entry["here"] else f"{entry['path'] or '?'} (not here)"
        step = f"step {entry['step']}" if entry["step"] is not None else ""
        act = f"{entry['act'] or 'unknown'}{' (' + entry['stage'] + ')' if entry['stage'] else ''}"
        print(f"{mark} {entry['digest'][:12]}  {act}  {step}  {where}  {entry['created'] or ''}".rstrip())
        for line in entry["changed"]:
            print(f"|     changed {line}")
        for line in entry["mixture"]:
            print(f"|     mixture {line}")
