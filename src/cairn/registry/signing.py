"""Signatures by a standard tool: `ssh-keygen -Y` over the manifest, whose digests cover every file, lineage included.

The signature lies beside the checkpoint, with what else is said of it. Whose keys count is a file of allowed signers, as git knows it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cairn.checkpoint.format import read
from cairn.checkpoint.format.manifest import MANIFEST
from cairn.checkpoint.format.read import Checkpoint
from cairn.errors import InputError, NotFoundError
from cairn.registry import statements

NAMESPACE = "cairn"
SIGNERS = "CAIRN_SIGNERS"
"""Environment variable that names the file of allowed signers."""


@dataclass(frozen=True)
class Signature:
    """`good`: by an allowed signer; `unknown`: sound, by nobody who is allowed; `bad`: not over these bytes; `none`."""

    state: Literal["good", "unknown", "bad", "none"]
    signer: str | None = None


def place_of(checkpoint: Checkpoint) -> Path:
    """Where the signature of a checkpoint lies."""
    return statements.folder_of(checkpoint) / f"{checkpoint.path.resolve().name}.sig"


def sign(source: str | Path, key: str | Path) -> Path:
    """Sign a checkpoint with an SSH key; the signature replaces an older one. Raises `InputError` for what cannot be signed with."""
    checkpoint = read.open(source)
    if not checkpoint.is_ours:
        raise InputError(f"{checkpoint.path} has no {MANIFEST} to sign; `cairn import` makes a checkpoint of it.")
    if not Path(key).is_file():
        raise NotFoundError(f"There is no key {key}; `ssh-keygen -t ed25519 -f {key}` makes one.")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / MANIFEST
        shutil.copyfile(checkpoint.path / MANIFEST, copy)
        done = _ssh("sign", "-f", str(key), "-n", NAMESPACE, str(copy))
        if done.returncode:
            raise InputError(f"{key} does not sign: {' '.join(done.stderr.decode(errors='replace').split()).rstrip('.')}.")
        target = place_of(checkpoint)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(copy.with_name(f"{MANIFEST}.sig"), target)
    return target


def check(checkpoint: Checkpoint, signers: str | Path | None = None) -> Signature:
    """Whether a checkpoint is signed, over these very bytes, and by whom. `signers` defaults to the file that `$CAIRN_SIGNERS` names."""
    signature = place_of(checkpoint)
    if not signature.is_file():
        return Signature("none")
    manifest = (checkpoint.path / MANIFEST).read_bytes()
    named = signers if signers is not None else os.environ.get(SIGNERS)
    if named is not None:
        if not Path(named).is_file():
            raise NotFoundError(f"There is no file of allowed signers {named}.")
        found = _ssh("find-principals", "-s", str(signature), "-f", str(named))
        for principal in found.stdout.decode(errors="replace").split("\n") if found.returncode == 0 else []:
            asked = ("-f", str(named), "-I", principal.strip(), "-n", NAMESPACE, "-s", str(signature))
            if principal.strip() and _ssh("verify", *asked, data=manifest).returncode == 0:
                return Signature("good", principal.strip())
    sound = _ssh("check-novalidate", "-n", NAMESPACE, "-s", str(signature), data=manifest).returncode == 0
    return Signature("unknown" if sound else "bad")


def _ssh(act: str, *arguments: str, data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["ssh-keygen", "-Y", act, *arguments], input=data if data is not None else b"", capture_output=True, check=False, timeout=60)
    except FileNotFoundError:
        raise InputError("Signatures need ssh-keygen, which is not on this machine; it comes with OpenSSH.") from None
