"""cairn verify"""

from pathlib import Path
from typing import Annotated, Any

import typer

from cairn.cli import console, places


def verify(
    checkpoint: Annotated[str, places.anywhere("A checkpoint or a run; with --all, a folder.")],
    every: Annotated[bool, typer.Option("--all", help="Every checkpoint under a folder, and whether each descent can be walked.")] = False,
    signers: Annotated[Path | None, places.local("File of allowed signers: the checkpoint must bear a signature of one of them.", "--signers")] = None,
    json: console.Json = False,
) -> None:
    """Check every byte of a checkpoint, or of a folder.

    Bytes are compared with the manifests.
    """
    if every:
        _tree(checkpoint, json)
        return
    from cairn.checkpoint.format.verify import verify as check

    with console.Bytes("verifying") as progress:
        report = check(checkpoint, progress)
    signature = _signature(report.path, signers) if signers is not None and report.sound else None
    if json:
        console.emit(_plain(report) | ({"signature": vars(signature)} if signature is not None else {}))
    elif report.sound:
        print(f"{report.path} is sound: {console.size(report.bytes)}, digest {report.digest}")
    else:
        for item in report.damage:
            print(item)
    if signature is not None and not json:
        print(f"signature: {signature.state}{f', by {signature.signer}' if signature.signer else ''}")
    if not report.sound or (signature is not None and signature.state != "good"):
        raise typer.Exit(1)


def _signature(path: Path, signers: Path) -> Any:
    from cairn.checkpoint.format import read
    from cairn.registry.signing import check

    return check(read.open(path), signers)


def _tree(folder: str, json: bool) -> None:
    from cairn.registry.tree import size_of, verify_all

    found = verify_all(folder)
    if json:
        absent = {str(path): digests for path, digests in found.absent.items()}
        lists = {"unpinned": list(map(str, found.unpinned)), "absent": absent, "circles": list(map(str, found.circles))}
        lists["left_behind"] = list(map(str, found.left_behind))
        console.emit({"path": str(found.path), "sound": found.sound, "bytes": found.bytes, "checkpoints": [_plain(r) for r in found.reports], **lists})
    else:
        for report in found.reports:
            for item in report.damage:
                print(f"{report.path}: {item}")
        for path in found.circles:
            print(f"{path}: its lineage leads back to itself")
        for path in found.left_behind:
            print(f"{path}: {console.size(size_of(path))} that a killed writer left behind; the next one that writes there removes it, and so may you")
        for path in found.unpinned:
            print(f"{path}: a plain directory, nothing says which bytes were meant")
        away = sum(map(len, found.absent.values()))
        bad = sum(not report.sound for report in found.reports)
        print(f"{len(found.reports)} checkpoints, {console.size(found.bytes)}: {f'{bad} damaged' if bad else 'all sound'}; {away} parents lie elsewhere")
    if not found.sound:
        raise typer.Exit(1)


def _plain(report: Any) -> dict[str, Any]:
    damage = [vars(item) | {"sentence": str(item)} for item in report.damage]
    return {"path": str(report.path), "sound": report.sound, "digest": report.digest, "bytes": report.bytes, "damage": damage}
