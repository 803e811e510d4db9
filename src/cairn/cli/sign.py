"""cairn sign"""

from pathlib import Path
from typing import Annotated

from cairn.cli import console, places


def sign(
    checkpoint: Annotated[str, places.anywhere("A checkpoint, or a run: then its newest one.")],
    key: Annotated[Path, places.local("A private SSH key, such as ~/.ssh/id_ed25519.", "--key")],
    json: console.Json = False,
) -> None:
    """Sign a checkpoint with an SSH key.

    `cairn verify --signers FILE` checks it.
    """
    from cairn.registry.signing import sign as make

    path = make(checkpoint, key)
    console.emit({"signature": str(path)}) if json else print(path)
