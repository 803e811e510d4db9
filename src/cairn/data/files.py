"""Files of text as everything here reads them: one rule for compression, encoding, newlines, JSON lines and names.

- A name that ends in `.gz` or `.zst` is decompressed while it is read.
- Text is UTF-8; a byte-order mark is dropped, and one of UTF-16 says that the file is UTF-16. Anything else is an error that names the line.
- Lines of text end at a line feed, at a carriage return, or at both. Lines of JSON end at a line feed alone: a line separator of Unicode inside a
  string ends none.
- Files and folders whose names begin with a dot are passed over when a folder is searched, and read when they are named.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from cairn.errors import DamagedError, InputError, NotFoundError

COMPRESSED = (".gz", ".zst")
_PART = 2**16
"""Bytes that are read at once."""


def kind_of(path: Path) -> str:
    """The suffix that says what a file holds, in small letters: that before `.gz` or `.zst`, if it is compressed."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def below(folder: Path) -> Iterator[Path]:
    """All files in a folder and its folders, hidden ones passed over."""
    for path in folder.rglob("*"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts) and path.is_file():
            yield path


def parts(path: Path) -> Iterator[str]:
    """The text of a file in parts of bounded size, every newline as a line feed. Raises `DamagedError` for what is no text."""
    decoder: codecs.IncrementalDecoder | None = None
    newlines, line = _Newlines(), 1
    for data, last in _read(path):
        if decoder is None:
            encoding, data = _marked(data)
            decoder = codecs.getincrementaldecoder(encoding)()
        try:
            text = decoder.decode(data, last)
        except UnicodeDecodeError as error:
            raise DamagedError(f"{path}, line {line + error.object[: error.start].count(10)} is not UTF-8 text; convert the file first.") from None
        text = newlines.unified(text, last)
        line += text.count("\n")
        if text:
            yield text


def rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file of JSON lines, each with the place that an error names; empty lines are passed over.

    Raises `DamagedError` for a line that is no JSON object, is not UTF-8, or holds half a character.
    """
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _object(line, where)


def opened(path: Path) -> IO[bytes]:
    """A file for reading, decompressed. Raises `NotFoundError` without one and `InputError` for what is no file."""
    if not path.exists():
        raise NotFoundError(f"There is no file {path}.")
    if not path.is_file():
        raise InputError(f"{path} is not a file.")
    if path.suffix.lower() == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    return _zstd(path) if path.suffix.lower() == ".zst" else path.open("rb")


def _zstd(path: Path) -> IO[bytes]:
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]  # Python 3.14

        return zstd.open(path)  # type: ignore[no-any-return, unused-ignore]
    except ImportError:
        pass
    try:
        import pyarrow
    except ImportError:
        raise InputError(f"Reading {path} needs Python 3.14 or pyarrow: pip install 'cairn-lm[hf]'.") from None
    return pyarrow.input_stream(str(path), compression="zstd")  # type: ignore[no-any-return]


def _read(path: Path) -> Iterator[tuple[bytes, bool]]:
    """The bytes of a file in parts, and whether each is the last."""
    with opened(path) as file:
        try:
            data = file.read(_PART)
            while data:
                following = file.read(_PART)
                yield bytes(data), not following
                data = following
        except (EOFError, OSError, zlib.error) as error:
            raise DamagedError(f"{path} cannot be read to its end: {error}") from None


def _marked(data: bytes) -> tuple[str, bytes]:
    """The encoding that a byte-order mark names, and what follows the mark."""
    for mark, encoding in ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        if data.startswith(mark):
            return encoding, data[len(mark) :]
    return "utf-8", data


class _Newlines:
    """Turns every newline into a line feed, also one that two parts share."""

    def __init__(self) -> None:
        self._held = ""

    def unified(self, text: str, last: bool) -> str:
        text, self._held = self._held + text, ""
        if text.endswith("\r") and not last:
            text, self._held = text[:-1], "\r"
        return text.replace("\r\n", "\n").replace("\r", "\n")


def _lines(path: Path) -> Iterator[str]:
    """Lines that end at a line feed alone, the feed left out."""
    rest, number, first = b"", 0, True
    for data, last in _read(path):
        if first:
            first = False
            data = data.removeprefix(codecs.BOM_UTF8)
        *whole, rest = (rest + data).split(b"\n")
        for line in [*whole, *([rest] if last else [])]:
            number += 1
            try:
                yield line.decode()
            except UnicodeDecodeError:
                raise DamagedError(f"{path}, line {number} is not UTF-8 text; convert the file first.") from None


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise DamagedError(f"{where} is not valid JSON.") from None
    if not isinstance(row, dict):
        raise DamagedError(f"{where} is not a JSON object but {type(row).__name__}.")
    if "\\ud" in line.lower() and not _encodable(row):
        raise DamagedError(f"{where} holds half a character (a lone surrogate such as \\ud83d); repair what wrote it.")
    return row


def _encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
