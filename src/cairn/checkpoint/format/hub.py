"""Checkpoints of a model hub by name, `hf:org/name@revision`, and the folders in which its cache keeps them.

The cache belongs to other programs: its links are read, and nothing is ever written into it but what the hub's own library downloads.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from cairn.errors import InputError, NotFoundError

PREFIX = "hf:"
_NAME = re.compile(r"hf:([\w.-]+/[\w.-]+|[\w.-]+)(?:@([\w./-]+))?")
FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken")
"""What is fetched of a repository: no pickles, no code."""


def is_hub(text: str | Path) -> bool:
    """Whether a text names a checkpoint of a hub."""
    return isinstance(text, str) and text.startswith(PREFIX)


@functools.cache
def snapshot(name: str) -> Path:
    """The folder in the hub's cache that holds `hf:org/name@revision`, fetched if it is not there.

    Raises `InputError` for a name of another form, where huggingface-hub is not installed, and where the hub cannot be reached or has no
    such repository.
    """
    match = _NAME.fullmatch(name)
    if match is None or ".." in name:
        raise InputError(f"'{name[:100]}' is no name of a hub's checkpoint; write hf:ORGANISATION/NAME, or hf:ORGANISATION/NAME@REVISION.")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError:
        raise InputError(f"{name} lies on a hub, which huggingface-hub reads: pip install 'cairn-lm[hf]'.") from None
    repository, revision = match[1], match[2]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(FILES)))
    except RevisionNotFoundError:
        raise NotFoundError(f"The hub's {repository} has no revision '{revision}'.") from None
    except RepositoryNotFoundError:
        raise NotFoundError(f"The hub has no repository {repository}, or it is not open to you (hf auth login).") from None
    except LocalEntryNotFoundError:
        raise InputError(
            f"{name} is not in the hub's cache, and the hub cannot be reached from here; fetch it where it can: hf download {repository}."
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise InputError(f"{name} cannot be fetched: {' '.join(str(error).split())[:200].rstrip('.')}.") from None


def snapshot_in(folder: Path) -> Path | None:
    """The snapshot that a repository's folder in the cache means: that of its branch main, or the only one. None for any other folder."""
    if not folder.name.startswith("models--") or not (folder / "snapshots").is_dir():
        return None
    found = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    named = main.read_text(encoding="utf-8", errors="replace").strip()[:64] if main.is_file() else ""
    chosen = next((path for path in found if path.name == named), found[0] if len(found) == 1 else None)
    if chosen is None:
        raise InputError(f"{folder} holds {len(found)} snapshots; name one of them: {folder / 'snapshots'}/...")
    return chosen
