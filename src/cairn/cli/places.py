"""What a command takes where a file or a folder is meant: one rule for every command and option.

`anywhere` takes a path, or the URL of a store (`s3://bucket/run`), and hands it on as text, which the library opens by `place`.
`local` takes a path on this machine alone and refuses a URL in one sentence: the name of a bucket must never become a folder here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from cairn.checkpoint.format.place import place
from cairn.errors import InputError


def anywhere(help: str, *names: str, **more: Any) -> Any:
    """A parameter that takes a path or a URL; an option where `names` are given, else an argument. Its type is `str`."""
    return _parameter(names, help, _anywhere, more)


def local(help: str, *names: str, **more: Any) -> Any:
    """A parameter that takes a path on this machine and refuses a URL. Its type is `Path`."""
    return _parameter(names, help, _local, more)


def named(help: str, *names: str, **more: Any) -> Any:
    """A parameter that takes the name of something known, or a path on this machine, and refuses a URL. Its type is `str`."""
    return _parameter(names, help, checked_name, more)


def mixed(help: str, **more: Any) -> Any:
    """An argument that takes paths or URLs and KEY=VALUE options; `separated` tells them apart. Its type is `list[str]`."""
    return _parameter((), help, _mixed, more)


def separated(inputs: list[str]) -> tuple[list[str], list[str]]:
    """The paths and URLs of a `mixed` argument, and its KEY=VALUE options."""
    settings = [item for item in inputs if is_setting(item)]
    return [item for item in inputs if item not in settings], settings


def is_setting(text: str) -> bool:
    """Whether a text is KEY=VALUE: a URL or a path that exists may have '=' in it and is not one."""
    key = text.partition("=")[0]
    return "=" in text and "://" not in key and not Path(text).exists()


def _parameter(names: tuple[str, ...], help: str, parser: Callable[[str], Any], more: dict[str, Any]) -> Any:
    # An argument goes by its name, which errors call it by; an option says what it takes.
    if names:
        return typer.Option(*names, help=help, parser=parser, **{"metavar": TAKES[parser]} | more)
    return typer.Argument(help=help, parser=parser, **more)


def _anywhere(text: str) -> str:
    if not text:
        raise InputError("An empty path was given; name a file or a folder.")
    return str(place(text))  # raises for a store of an unknown kind, and takes the scheme off a file:// URL


def _local(given: str | Path) -> Path:
    text = str(given)  # a default is a path already
    if not text:
        raise InputError("An empty path was given; name a file or a folder.")
    if "://" in text and not text.startswith("file://"):
        raise InputError(f"{text} is the URL of a store, and this has to be a path on this machine.")
    return Path(place(text))


def checked_name(text: str) -> str:
    """A name, or a path on this machine; a URL is refused."""
    return str(_local(text)) if "://" in text else text


def _mixed(text: str) -> str:
    return text if is_setting(text) else _anywhere(text)


TAKES: dict[Callable[[str], Any], str] = {_anywhere: "PATH|URL", _local: "PATH", checked_name: "NAME|PATH", _mixed: "PATH|URL"}
"""What help says that an option takes."""
