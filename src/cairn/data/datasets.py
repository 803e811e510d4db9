"""Named public data sets: origin, license and digests are known here; the files are found or fetched.

A set is looked for under `$CAIRN_DATA`, then in the user's cache, and only `fetch` goes to its origin, where every file is
checked against its digest. Nothing of any set is part of this package.
"""

from __future__ import annotations

import csv
import functools
import gzip
import json
import os
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from cairn import cache
from cairn.data import files, reading
from cairn.errors import DamagedError, InputError, NotFoundError, suggestion


@dataclass(frozen=True)
class NamedDataset:
    """What is known of one set. `folder` is where its files lie in the origin's repository, None if it was put together
    from several places and cannot be fetched file by file."""

    name: str
    about: str
    repository: str
    commit: str
    license: str
    tests_only: bool
    folder: str | None
    files: dict[str, dict[str, Any]]

    @property
    def bytes(self) -> int:
        return sum(file["bytes"] for file in self.files.values())

    def url(self, file: str) -> str:
        """The address of one file at its origin."""
        place = f"{self.folder}/{file}" if self.folder else file
        return f"https://github.com/{self.repository}/raw/{self.commit}/{place}"


@functools.cache
def known() -> dict[str, NamedDataset]:
    """All named sets."""
    table = json.loads(resources.files("cairn.data").joinpath("datasets.json").read_text())
    return {name: NamedDataset(name, **entry) for name, entry in table.items()}


def names() -> list[str]:
    """The names, sorted."""
    return sorted(known())


def list_() -> list[dict[str, Any]]:
    """The named data sets and where they are on this machine.

    Returns
    -------
    list of dict
        Name, what it is, license, whether tests alone may read it, bytes, origin, and its path here (None: not here).

    Examples
    --------
    >>> cairn.data.list_()[0].get("license")  # doctest: +SKIP
    """
    return [
        {
            "name": entry.name,
            "about": entry.about,
            "license": entry.license,
            "tests_only": entry.tests_only,
            "bytes": entry.bytes,
            "origin": f"{entry.repository}@{entry.commit}",
            "path": str(locate(entry.name) or "") or None,
        }
        for entry in known().values()
    ]


def get(name: str) -> NamedDataset:
    """One set's entry. Raises `NotFoundError` naming the nearest."""
    if name not in known():
        raise NotFoundError(f"There is no data set '{name}'.{suggestion(name, names())}")
    return known()[name]


def locate(name: str) -> Path | None:
    """The folder of a set under `$CAIRN_DATA` or in the cache, or None."""
    entry = get(name)
    homes = [Path(os.environ["CAIRN_DATA"])] if os.environ.get("CAIRN_DATA") else []
    for home in [*homes, cache.directory() / "datasets"]:
        if all((home / name / file).is_file() for file in entry.files):
            return home / name
    return None


def find(name: str) -> Path:
    """The folder of a set. Raises `NotFoundError` that says how to get it."""
    path = locate(name)
    note(name)
    if path is None:
        raise NotFoundError(f"The data set '{name}' is not on this machine; `cairn data fetch {name}` gets it, or set CAIRN_DATA to a folder that holds it.")
    return path


def note(name: str) -> None:
    """Say that a set is read (see `reading`)."""
    entry = get(name)
    reading.note(name, f"{entry.repository}@{entry.commit[:12]}", lambda: contents(name))


def contents(name: str) -> str:
    """Digest of a set's files as they lie on this machine."""
    folder = find(name)
    return cache.contents(folder / file for file in sorted(get(name).files))


def fetch(name: str, *, allow_tests_only: bool = False, progress: Callable[[int, int], object] | None = None) -> Path:
    """Get a set from its origin into the cache, every file checked against its digest; already there means done.

    Raises `InputError` for sets whose license allows tests only (unless allowed by name) or that have no single origin,
    `DamagedError` if what arrives is not what was published, `NotFoundError` if the origin cannot be reached.
    """
    entry = get(name)
    present = locate(name)
    if present is not None:
        return present
    if entry.tests_only and not allow_tests_only:
        raise InputError(f"'{name}' ({entry.license}) is for tests only and is not fetched unless you ask with --tests-only.")
    if entry.folder is None:
        raise InputError(f"'{name}' was put together from {entry.repository}@{entry.commit} and has no single file to fetch; see its page there.")
    path = cache.directory() / "datasets" / name
    cache.publish(path, lambda folder: _download(entry, folder, progress))
    return path


def check(name: str) -> list[str]:
    """Files of a set on this machine whose contents are not what was published; empty means all is well."""
    path = find(name)
    return [file for file, known_as in get(name).files.items() if not _is_published((path / file).read_bytes(), known_as)]


def _is_published(data: bytes, known_as: Mapping[str, Any]) -> bool:
    """Whether a file is the published one. A gzip file also says when and under what name it was packed; where `unpacked` is known, what is
    inside decides."""
    if blake3(data).hexdigest() == known_as["blake3"]:
        return True
    try:
        return "unpacked" in known_as and blake3(gzip.decompress(data)).hexdigest() == known_as["unpacked"]
    except (OSError, EOFError, zlib.error):
        return False


def rows(name: str, file: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of one file of a set (or of all its files in turn) as mappings: JSON lines, JSON lists or objects, CSV.

    In a set of several files each row also says its `file`.
    """
    files = get(name).files
    for each in [file] if file is not None else sorted(files):
        for row in _rows(_member(name, each)):
            yield row | {"file": each} if len(files) > 1 else row


def _member(name: str, file: str) -> Path:
    """One file of a set on this machine. Raises `NotFoundError` naming the nearest."""
    folder, files = find(name), get(name).files
    if file not in files:
        raise NotFoundError(f"The data set '{name}' has no file '{file}'.{suggestion(file, files)}")
    return folder / file


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".jsonl":
        yield from (row for _, row in files.rows(path))
    elif path.suffix == ".json":
        document = json.loads(path.read_text(encoding="utf-8"))
        items = document if isinstance(document, list) else [{"key": key, "value": value} for key, value in document.items()]
        yield from (item if isinstance(item, dict) else {"text": item} for item in items)
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file)
    elif path.suffix == ".conllu":
        yield from sentences(path)
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for member in sorted(archive.namelist()):
                if member.endswith(".json"):
                    yield {"member": member, "value": json.loads(archive.read(member))}
    elif path.suffix == ".txt":
        yield {"text": path.read_text(encoding="utf-8")}
    else:
        raise InputError(f"{path.name} has no rows; read the file itself.")


def array(name: str, file: str) -> NDArray[Any]:
    """The array in an IDX file of a set, such as the images (n, 28, 28) or labels (n,) of `mnist-10k`, compressed or not; big-endian items
    become native ones. Raises `DamagedError` for what is no IDX file or has other than the items that its head announces."""
    path = _member(name, file)
    data = path.read_bytes()
    return _idx(gzip.decompress(data) if path.suffix == ".gz" else data, path)


IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def _idx(data: bytes, path: Path) -> NDArray[Any]:
    """Two zero bytes, the type, the number of dimensions, each as four bytes, then the items."""
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in IDX_TYPES or len(data) < 4 + 4 * data[3]:
        raise DamagedError(f"{path} is not an IDX file.")
    kind, begin = np.dtype(IDX_TYPES[data[2]]), 4 + 4 * data[3]
    shape = np.frombuffer(data, ">u4", data[3], 4).astype(np.int64)
    if len(data) - begin != shape.prod() * kind.itemsize:
        raise DamagedError(f"{path} announces {' x '.join(map(str, shape))} items and has {(len(data) - begin) // kind.itemsize}.")
    return np.frombuffer(data, kind, offset=begin).astype(kind.newbyteorder("=")).reshape(shape)


def sentences(path: Path) -> Iterator[dict[str, Any]]:
    """Sentences of a CoNLL-U file: `text` and `words`, each a list of its ten columns (multiword and empty nodes left out). Raises
    `DamagedError` for what is no text."""
    text, words = "", list[list[str]]()
    for line in [*"".join(files.parts(path)).split("\n"), ""]:
        if line.startswith("# text = "):
            text = line.removeprefix("# text = ")
        elif not line and words:
            yield {"text": text, "words": words}
            text, words = "", []
        elif line and not line.startswith("#") and line.split("\t")[0].isdigit():
            words.append(line.split("\t"))


def _download(entry: NamedDataset, folder: Path, progress: Callable[[int, int], object] | None) -> None:
    done = 0
    for file, known_as in entry.files.items():
        try:
            with urllib.request.urlopen(entry.url(file), timeout=60) as answer:
                data = answer.read()
        except (urllib.error.URLError, TimeoutError) as error:
            raise NotFoundError(f"{entry.url(file)} cannot be reached ({error}); get the set elsewhere and point CAIRN_DATA at it.") from None
        if not _is_published(data, known_as):
            raise DamagedError(f"{entry.url(file)} is not the file that was published under this name; nothing was kept.")
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)
        done += len(data)
        if progress is not None:
            progress(done, entry.bytes)
