"""Places: plain paths, and URLs of stores (`s3://bucket/run`, `memory://runs/a`, whatever fsspec opens).

A store's place has the interface of a `Path`, so that the rest of the house need not know which one it holds; where the
difference matters it asks `is_store`. A plain path never imports fsspec.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, cast

from cairn.checkpoint.format import trust
from cairn.checkpoint.format.hub import is_hub, snapshot
from cairn.errors import InputError, Notice


def place(path: str | Path) -> Path:
    """The place that a text names; `hf:org/name@revision` is the folder in a hub's cache.

    Raises `InputError` for a URL whose kind of store is unknown or not installed, and for what a hub does not give.
    """
    text = str(path)
    if is_hub(path):
        return snapshot(text)
    if isinstance(path, Path) or "://" not in text:
        return Path(path)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    if not isinstance(path, str):
        return path
    try:
        from upath import UPath
    except ImportError:
        raise InputError(f"{text} lies in a store; pip install 'cairn-lm[scale]' reads and writes stores.") from None
    try:
        # What others have written in the meantime must show: listings are not remembered.
        found = UPath(text.rstrip("/"), use_listings_cache=False)
        _ = found.fs
    except (ImportError, ValueError) as error:
        raise InputError(f"{text} cannot be opened: {str(error).rstrip('.')}.") from None
    return cast(Path, found)


def new_place(path: str | Path) -> Path:
    """The place that a text names, where something is to be written. Raises `InputError` also for a name of a hub, which is read alone."""
    if is_hub(path):
        raise InputError(f"{path} is a name of a hub, from which checkpoints are read; name a folder or the URL of a store.")
    return place(path)


def permit(url: str | Path | None = None, *, keep: bool = False) -> None:
    """Allow what files say to lead to this URL and below, or, without one, to whatever they name; it holds for this process, and with `keep`
    for later ones.

    Files of a run or a checkpoint may name a store. Nothing connects to it because a file says so: a user asks for it, by naming the
    URL when the run is begun or with `--follow`.
    """
    if url is None:
        trust.allow_everything()
    else:
        (trust.note if keep else trust.allow)("store", str(url).rstrip("/"))


def permitted(url: str) -> bool:
    """Whether a URL that stands in a file may be opened. What lies in the memory of this process always may."""
    scheme, mark, rest = url.rstrip("/").partition("://")
    parts = rest.split("/")
    if scheme == "memory" and mark:
        return True
    if ".." in parts:
        return trust.known("store", url.rstrip("/"))
    return any(trust.known("store", f"{scheme}{mark}{'/'.join(parts[:count])}") for count in range(len(parts), 0, -1))


def named_place(url: str, file: Path, *, follow: bool = False) -> Path:
    """The place that a URL in a file names. Raises `InputError`, which shows the URL, unless it may be opened."""
    if follow:
        permit(url)
    if not permitted(url):
        raise InputError(f"{file} names {url[:300]!r}, which is not opened because a file says so; --follow (follow=True) opens it.")
    return place(url)


def is_store(path: Path) -> bool:
    """Whether a place lies in a store, where objects are written whole and nothing can be renamed."""
    return not isinstance(path, Path)


def file_system(path: Path) -> Any:
    """The fsspec file system behind a store's place."""
    return cast(Any, path).fs


def key(path: Path) -> str:
    """The name by which the file system of a store knows a place."""
    return cast(Any, path).path


def sizes(directory: Path) -> dict[str, int]:
    """Names and sizes of the files directly in a directory; one request in a store. Empty if there is no such directory."""
    try:
        if not is_store(directory):
            return {entry.name: entry.stat().st_size for entry in os.scandir(directory) if entry.is_file()}
        listed = file_system(directory).ls(key(directory), detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {entry["name"].rstrip("/").rpartition("/")[2]: entry["size"] for entry in listed if entry["type"] == "file"}


def write_new(path: Path, data: bytes) -> None:
    """Write an object of a store that must not exist yet. Raises `FileExistsError`, as far as the store can tell, if it does."""
    fs = file_system(path)
    if fs.exists(key(path)):
        raise FileExistsError(f"{path} exists")
    try:
        fs.pipe_file(key(path), data, mode="create")
    except NotImplementedError:
        fs.pipe_file(key(path), data)


def remove(directory: Path, first: str) -> None:
    """Remove a directory for good. The file `first` goes before all others: without it nothing is visible to readers."""
    if is_store(directory):
        fs = file_system(directory)
        if fs.exists(key(directory / first)):
            fs.rm_file(key(directory / first))
        fs.rm(key(directory), recursive=True)
    elif directory.is_symlink():
        directory.unlink()  # what it leads to is somebody else's
    else:
        # Out of sight in one act: a kill in the middle of the removal must not leave half of it visible.
        hidden = directory.with_name(f".old-{directory.name}")
        directory.rename(hidden)
        shutil.rmtree(hidden)


def set_aside(directory: Path) -> Path:
    """Rename what a reader must not meet again and nobody may lose, and say so (`Notice`); returns where it lies now."""
    aside = directory.with_name(f"damaged-{directory.name}")
    number = 1
    while aside.exists():
        number += 1
        aside = directory.with_name(f"damaged-{directory.name}-{number}")
    directory.rename(aside)
    warnings.warn(f"{directory} is not a complete, sound checkpoint; it was set aside as {aside.name}.", Notice, stacklevel=2)
    return aside


def way(path: Path, directory: Path) -> str:
    """How to come from `directory` to `path`: relative where both lie on one file system, else the whole path."""
    if is_store(path) or is_store(directory):
        here, there = str(directory).rstrip("/").split("/"), str(path).split("/")
        same = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), min(len(here), len(there)))
        # Scheme, '' and bucket must be the same for one to be reached from the other.
        if is_store(path) and is_store(directory) and same >= 3:
            return "/".join([".."] * (len(here) - same) + there[same:]) or "."
        return str(path if is_store(path) else path.resolve())
    return os.path.relpath(path.resolve(), directory.resolve())


def follow(directory: Path, way: str) -> Path:
    """Where `way` leads from a directory: the other direction of `way`. Raises `InputError` for a URL that may not be opened."""
    if "://" in way:
        return named_place(way, directory)
    if not is_store(directory):
        return directory / way
    if way.startswith("/"):
        return Path(way)
    parts = str(directory).rstrip("/").split("/")
    for step in way.split("/"):
        if step == "..":
            parts.pop()
        elif step != ".":
            parts.append(step)
    return place("/".join(parts))


def refusals() -> tuple[type[Exception], ...]:
    """What an operating system or a store raises when it cannot do what was asked."""
    boto = sys.modules.get("botocore.exceptions")  # only there once a store has been used
    return (OSError, boto.BotoCoreError) if boto is not None else (OSError,)
