"""Files of items: JSON lines, each an object; a text is one of its values or a template filled with them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from blake3 import blake3

from cairn.errors import InputError, NotFoundError

_SLOT = re.compile(r"\{(\w+)\}")


def digest_of(path: Path) -> str:
    """Digest of a file's contents. Raises `NotFoundError`."""
    return blake3(_present(path).read_bytes()).hexdigest()


def read_rows(path: Path, limit: int | None = None) -> list[tuple[str, dict[str, Any]]]:
    """The first `limit` objects of a file, each with the place that an error names. Raises `InputError` for what is none."""
    found: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(_present(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if limit is not None and len(found) == limit:
            break
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number} is not an item: one JSON object a line.")
        found.append((f"{path}, line {number}", row))
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
