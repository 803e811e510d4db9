"""cairn serve"""

from pathlib import Path
from typing import Annotated

import typer

from cairn.cli import console, places


def serve(
    folders: Annotated[list[Path] | None, places.local("Folders to index and show; without any, those that are indexed.")] = None,
    host: Annotated[str, typer.Option(help="Where to listen; anywhere but on the loopback a token is asked for.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes any that is free.")] = 8420,
    token: Annotated[
        str | None, typer.Option(envvar="CAIRN_TOKEN", help="Token that visitors must show; one is made where it is needed and none is given.")
    ] = None,
    file: Annotated[Path | None, places.local("The index to use; default: the user's own.", "--index")] = None,
    device: console.Device = None,
    json: console.Json = False,
) -> None:
    """Show runs and checkpoints on a local page.

    Runs as they train, lineage, claims and comparisons.
    """
    from cairn.registry.web.server import serve as run

    def ready(address: str) -> None:
        if json:
            console.emit({"address": address})
        else:
            console.say(f"{address}   (Ctrl-C ends it)")

    run(folders or [], host=host, port=port, token=token, index=file, device=device, ready=ready)
