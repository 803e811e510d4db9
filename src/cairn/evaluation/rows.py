"""Files of items: JSON lines, each an object; a text is one of its values or a template filled with them."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Any

from blake3 import blake3

from cairn.data import files
from cairn.errors import InputError, NotFoundError

_SLOT = re.compile(r"\{(\w+)\}")


def digest_of(path: Path) -> str:
    """Digest of a file's contents. Raises `NotFoundError`."""
    return blake3(_present(path).read_bytes()).hexdigest()


def read_rows(path: Path, limit: int | None = None) -> list[tuple[str, dict[str, Any]]]:
    """The first `limit` objects of a file, each with the place that an error names. Raises `InputError` without any, and as `files.rows`."""
    found = list(islice(files.rows(_present(path)), limit))
    if not found:
        raise InputError(f"{path} holds no items.")
    return found


def filled(template: str, row: dict[str, Any], where: str) -> str:
    """The value of the key `template`, or, if it has `{key}` in it, the template with the values put in. Raises `InputError`."""
    names = _SLOT.findall(template)
    missing = [name for name in names or [template] if name not in row]
    if missing:
        raise InputError(f"{where} has no key '{missing[0]}'; its keys are {', '.join(sorted(row))}.")
    if names:
        return _SLOT.sub(lambda slot: str(row[slot[1]]), template)
    if not isinstance(row[template], str):
        raise InputError(f"{where}: '{template}' must be a text.")
    return row[template]


def _present(path: Path) -> Path:
    if not path.is_file():
        raise NotFoundError(f"There is no file {path} of items.")
    return path
