"""cairn index"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cairn.cli import console


def index(
    folders: Annotated[
        list[str] | None, typer.Argument(help="Folders to index, with everything under them; without any, those that are indexed are refreshed.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--index", help="The index to use; default: the user's own.")] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Forget everything and read all folders anew.")] = False,
    forget: Annotated[bool, typer.Option("--forget", help="Take the folders out of the index; nothing happens to them.")] = False,
    json: console.Json = False,
) -> None:
    """Index runs and checkpoints, so that they can be searched and looked at; only what is new or changed is opened."""
    from cairn.registry.index import Index

    with Index(file) as opened:
        if forget:
            for folder in folders or []:
                opened.forget(Path(folder).resolve())
            folders = None
        for folder in folders or []:
            report = opened.add(folder, console.say)
        if rebuild:
            report = opened.rebuild(console.say)
        elif not folders:
            report = opened.refresh(None, console.say)
        roots = [str(root) for root in opened.roots()]
    if json:
        console.emit(asdict(report) | {"index": str(file) if file else None, "folders": roots})
        return
    counts = f"{report.checkpoints} checkpoints of {report.runs} runs in {len(roots)} folders"
    print(f"{counts}; {report.opened} opened, {report.forgotten} gone, {report.seconds:.2f} s")
    for problem in report.problems:
        print(problem)
