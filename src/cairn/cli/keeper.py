"""cairn keeper"""

from pathlib import Path
from typing import Annotated

import typer

from cairn.cli import console, places

app = typer.Typer(help="Ask the processes that hold a run's states in memory.", no_args_is_help=True)
Run = Annotated[Path, places.local("A run.")]


@app.command()
def status(run: Run, json: console.Json = False) -> None:
    """What the keepers of a run hold."""
    from cairn.checkpoint.memory import attend

    found = attend.status(run)
    if json:
        console.emit(found)
        return
    columns = ("keeper", "node", "trainer", "idle", "steps held", "with parity", "memory")
    rows = [
        (k["name"], k["node"], "there" if k["trainer"] else "gone", f"{k['idle']:.0f} s", k["steps"], k["parity_steps"], console.size(k["bytes"]))
        if k["answers"]
        else (k["name"], k["node"], "does not answer", "-", "-", "-", "-")
        for k in found["keepers"]
    ]
    console.table(columns, rows)
    print(f"newest state that is whole: {found['newest'] if found['newest'] is not None else 'none'}")


@app.command()
def persist(
    run: Run,
    out: Annotated[Path | None, places.local("Where the checkpoint goes; default: among those of the run.", "-o", "--out")] = None,
    json: console.Json = False,
) -> None:
    """Write the newest state in memory to disk as an ordinary checkpoint."""
    from cairn.checkpoint.memory.persist import persist as write

    saved = write(run, out)
    figures = {"checkpoint": str(saved.path), "step": saved.step, "digest": saved.digest}
    console.emit(figures) if json else console.values(figures)


@app.command()
def stop(
    run: Run,
    discard: Annotated[bool, typer.Option("--discard", help="Do not write what they hold to disk first.")] = False,
    json: console.Json = False,
) -> None:
    """Let the keepers of a run go, after what they hold is on disk."""
    from cairn.checkpoint.memory import attend

    figures = attend.stop(run, discard=discard)
    console.emit(figures) if json else console.values(figures)
