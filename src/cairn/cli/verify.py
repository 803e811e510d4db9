"""cairn verify"""

from typing import Annotated

import typer

from cairn.cli import console


def verify(checkpoint: Annotated[str, typer.Argument(help="A checkpoint or a run.")], json: console.Json = False) -> None:
    """Check every byte of a checkpoint against its manifest."""
    from cairn.checkpoint.verify import verify as check

    with console.Bytes("verifying") as progress:
        report = check(checkpoint, progress)
    if json:
        damage = [vars(item) | {"sentence": str(item)} for item in report.damage]
        console.emit({"path": str(report.path), "sound": report.sound, "digest": report.digest, "bytes": report.bytes, "damage": damage})
    elif report.sound:
        print(f"{report.path} is sound: {console.size(report.bytes)}, digest {report.digest}")
    else:
        for item in report.damage:
            print(item)
    if not report.sound:
        raise typer.Exit(1)
