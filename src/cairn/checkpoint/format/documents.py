"""Small files: read with limits, kept whole.

What lies in a checkpoint or in a run may come from strangers. Every small file of theirs passes through here: it must be
a regular file, it is opened without waiting, a link is followed only where it stays inside its directory or inside one
hub cache, its size and the depth of its nesting are bounded, and what comes out is plain values of the expected kinds or
one sentence that says what is wrong. Writing is the other half: a file that is kept appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
import stat
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from cairn.checkpoint.format.place import file_system, is_store, key
from cairn.errors import DamagedError, Notice

LARGEST = 2**26
"""Bytes of a small file; a tokenizer with a vocabulary of 250,000 has a quarter of that."""
DEEPEST = 100
"""Levels of nesting of a JSON document; what people and programs write has less than ten."""
MOST_VALUES = 5_000_000
"""Values of one document: a vocabulary of 250,000 with its merges has a million."""
LONGEST_LINE = 2**24
"""Bytes of one line of a JSON-lines file."""

_HUBS = ("models--", "datasets--")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

M = TypeVar("M", bound=BaseModel)


def target_of(path: Path) -> Path:
    """The file that a name in a checkpoint or a run stands for.

    A link is followed where it stays inside its own directory and where a hub cache keeps the file in `blobs`.
    Raises `DamagedError` for a link that leads anywhere else.
    """
    if is_store(path) or not path.is_symlink():
        return path
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
    hub = next((folder for folder in home.parents if folder.name.startswith(_HUBS)), None)
    if target.is_relative_to(home) or (hub is not None and target.is_relative_to(hub / "blobs")):
        return target
    raise DamagedError(
        f"{path} is a link that leaves its directory; only the links of a hub cache are followed. If you trust the file it leads to, copy that file here."
    )


def open_file(path: Path, *, named: bool = False) -> int:
    """A descriptor of the regular file `path`, opened without waiting.

    `named`: the user named this very file, so a link may lead anywhere. Raises `FileNotFoundError` where there is nothing,
    `DamagedError` for a directory, a device, a pipe or a link that leaves its directory.
    """
    number = os.open(path if named else target_of(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(number).st_mode
    if stat.S_ISREG(mode):
        return number
    os.close(number)
    raise DamagedError(f"{path} is {_kind(mode)}, not a file.")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "something else")


def read_bytes(path: Path, *, limit: int = LARGEST, named: bool = False) -> bytes:
    """The contents of a small file. Raises `FileNotFoundError`, and `DamagedError` for what is no regular file or larger than `limit`."""
    if is_store(path):
        too_large = file_system(path).size(key(path)) > limit
        data = b"" if too_large else path.read_bytes()
    else:
        with os.fdopen(open_file(path, named=named), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            too_large = size > limit
            data = b"" if too_large else file.read(limit)
            while not too_large and (more := file.read(limit)):  # one call may return less than there is
                data += more
                too_large = len(data) > limit
    if too_large:
        raise DamagedError(f"{path} is larger than {limit / 2**20:.0f} MiB, the limit for a file of its kind.")
    return data


def read_text(path: Path, *, limit: int = LARGEST, named: bool = False) -> str:
    """The text of a small file in UTF-8. Raises like `read_bytes`, and `DamagedError` for bytes that are not UTF-8."""
    try:
        return read_bytes(path, limit=limit, named=named).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path} is not UTF-8: byte {error.start} belongs to no character.") from None


def parse(data: bytes | str, where: object) -> Any:
    """The document that JSON text holds; `where` is named in the error. Raises `DamagedError` for everything that is not sound JSON."""
    try:
        document = json.loads(data)
        deep = _deeper_than(document, DEEPEST)
        if isinstance(data, str) or _SURROGATE.search(data):
            json.dumps(document, ensure_ascii=False).encode()
    except RecursionError:
        deep = True
    except UnicodeEncodeError:
        raise DamagedError(f"{where} holds half of a character (a lone surrogate).") from None
    except ValueError:
        raise DamagedError(f"{where} is not valid JSON.") from None
    if deep:
        raise DamagedError(f"{where} is nested more than {DEEPEST} levels deep.")
    return document


def _deeper_than(document: Any, limit: int) -> bool:
    """Whether a document is nested deeper, or names so many values (YAML may name one many times) that walking through it would take for ever."""
    level, seen = [document] if isinstance(document, (dict, list)) else [], 0
    for _ in range(limit):
        if not level:
            return False
        seen += sum(map(len, level))
        if seen > MOST_VALUES:
            return True
        level = [item for node in level for item in (node.values() if isinstance(node, dict) else node) if isinstance(item, (dict, list))]
    return bool(level)


def parse_yaml(text: str, where: object) -> Any:
    """The document that YAML text holds, of plain values alone. Raises `DamagedError` for everything else, and for text that stands for far more."""
    try:
        document = yaml.safe_load(text)
        deep = _deeper_than(document, DEEPEST)
        if not deep:
            json.dumps(document, ensure_ascii=False, default=str, skipkeys=True).encode()
    except RecursionError:
        deep = True
    except UnicodeEncodeError:
        raise DamagedError(f"{where} holds half of a character (a lone surrogate).") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:  # a date that is none, a key that is a list
        raise DamagedError(f"{where} is not YAML: {' '.join(str(error).split())[:300]}.") from None
    if deep:
        raise DamagedError(f"{where} is nested more than {DEEPEST} levels deep, or says more than {MOST_VALUES} things.")
    return document


def read_json(path: Path, *, limit: int = LARGEST, named: bool = False) -> Any:
    """The document in a JSON file. Raises `FileNotFoundError` where there is none, `DamagedError` for anything that is not sound."""
    return parse(read_bytes(path, limit=limit, named=named), path)


def read_object(path: Path, *, limit: int = LARGEST, named: bool = False) -> dict[str, Any]:
    """The same for a file that must hold a JSON object."""
    return as_object(read_json(path, limit=limit, named=named), path)


def as_object(document: Any, where: object) -> dict[str, Any]:
    """The document, if it is an object. Raises `DamagedError` if it is anything else."""
    if not isinstance(document, dict):
        raise DamagedError(f"{where} is not a JSON object.")
    return document


def validated(model: type[M], document: Any, where: object) -> M:
    """A document as the strict model that says which keys it has and of which kinds. Raises `DamagedError` that names the key."""
    try:
        return model.model_validate(as_object(document, where), strict=True)
    except ValidationError as error:
        raise DamagedError(f"{where} is not sound: {explained(error)}.") from None


def fits(model: type[BaseModel], document: Any) -> bool:
    """Whether a document is what a strict model describes."""
    try:
        model.model_validate(document, strict=True)
    except ValidationError:
        return False
    return True


def explained(error: ValidationError) -> str:
    """The first thing that a validation found, in a few words; never the value itself, which may be anything."""
    first = error.errors(include_url=False, include_input=False)[0]
    key_ = ".".join(str(part) for part in first["loc"])
    cause = (first.get("ctx") or {}).get("error")
    problem = str(cause) if isinstance(cause, ValueError) else first["msg"][:1].lower() + first["msg"][1:]
    return f"'{key_[:80]}': {problem}".rstrip(".") if key_ else problem.rstrip(".")


def rows_and_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The whole lines of a JSON-lines file, each with its row, or None where it is not a JSON object; none where there is no file.

    A last line that a kill left unfinished is no line. Raises `DamagedError` at a line that is longer than any of ours.
    """
    try:
        file = path.open("rb") if is_store(path) else os.fdopen(open_file(path), "rb")
    except FileNotFoundError:
        return
    with file:
        while line := file.readline(LONGEST_LINE):
            if not line.endswith(b"\n"):
                if len(line) == LONGEST_LINE:
                    raise DamagedError(f"{path} has a line of more than {LONGEST_LINE / 2**20:.0f} MiB, so it is no file of rows; move it away.")
                return
            try:
                row = parse(line, path)
            except DamagedError:
                row = None
            yield line, row if isinstance(row, dict) else None


def read_rows(path: Path, kind: type[BaseModel] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file, one by one. A line that is not a JSON object, or not of this `kind`, is passed over, and said once (`Notice`)."""
    passed = 0
    for line, row in rows_and_lines(path):
        if row is not None and (kind is None or fits(kind, row)):
            yield row
        elif line.strip():
            passed += 1
    if passed:
        warnings.warn(f"{path}: {passed} line{'s' if passed > 1 else ''} passed over: not such rows as belong there.", Notice, stacklevel=2)


# -- keeping ------------------------------------------------------------------------------------------------------


def as_json(document: Any, indent: int | None = 2) -> bytes:
    """A document as the bytes of a JSON file."""
    return (json.dumps(document, indent=indent, ensure_ascii=False) + "\n").encode()


def keep(path: Path, data: bytes | str, *, mode: int = 0o666) -> None:
    """Write a small file so that it is there whole or not at all: under a name of its own, flushed, then renamed.

    What was there before is replaced; directories on the way are made. `mode` are the permissions, less the umask's.
    """
    data = data.encode() if isinstance(data, str) else data
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_store(path):
        path.write_bytes(data)  # an object appears whole
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:6]}.tmp")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def keep_json(path: Path, document: Mapping[str, Any] | list[Any], indent: int | None = 2) -> None:
    """`keep` for a JSON document."""
    keep(path, as_json(document, indent))
