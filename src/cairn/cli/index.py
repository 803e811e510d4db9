"""cairn index"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cairn.cli import console, places


def index(
    folders: Annotated[
        list[Path] | None, places.local("Folders to index, with everything under them; without any, those that are indexed are refreshed.")
    ] = None,
    file: Annotated[Path | None, places.local("The index to use; default: the user's own.", "--index")] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Forget everything and read all folders anew.")] = False,
    forget: Annotated[bool, typer.Option("--forget", help="Take the folders out of the index; nothing happens to them.")] = False,
    json: console.Json = False,
) -> None:
    """Index folders, so that they can be searched.

    Only runs and checkpoints that are new or changed are opened.
    """
    from cairn.registry.index import index as refresh

    report = refresh(folders or [], file=file, rebuild=rebuild, forget=forget, progress=console.say)
    if json:
        console.emit(asdict(report) | {"index": str(file) if file else None})
        return
    counts = f"{report.checkpoints} checkpoints of {report.runs} runs in {len(report.folders)} folders"
    print(f"{counts}; {report.opened} opened, {report.forgotten} gone, {report.seconds:.2f} s")
    for problem in report.problems:
        print(problem)
