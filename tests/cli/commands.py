"""Every command of the command line, found by walking, so that no test forgets one."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import typer

from cairn.cli.main import app


@dataclass(frozen=True)
class Parameter:
    """One argument or option of a command: what its value is, how it is written, and what reads it."""

    name: str
    type: Any
    options: tuple[str, ...]
    """Empty for an argument."""
    parser: str | None
    """The function of `cairn.cli.places` that reads it, where it is a path."""


def commands() -> dict[str, Callable[..., Any]]:
    """The function of each command by its words: `show`, `data list`."""
    return dict(_walk(app, ""))


def _walk(group: typer.Typer, words: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    for command in group.registered_commands:
        assert command.callback is not None
        yield f"{words} {command.name or command.callback.__name__.rstrip('_').replace('_', '-')}".strip(), command.callback
    for inner in group.registered_groups:
        yield from _walk(inner.typer_instance, f"{words} {inner.name}".strip())


def parameters(function: Callable[..., Any]) -> list[Parameter]:
    """The arguments and options of a command."""
    return [_parameter(name, hint) for name, hint in typing.get_type_hints(function, include_extras=True).items() if name != "return"]


def _parameter(name: str, hint: Any) -> Parameter:
    if typing.get_origin(hint) is not typing.Annotated:
        hint = next(inner for inner in typing.get_args(hint) if typing.get_origin(inner) is typing.Annotated)
    kind, info = typing.get_args(hint)
    parser = getattr(info, "parser", None)
    # What stands first in Option(...) is taken for its default until the command is built.
    declared = tuple(each for each in (info.default, *(info.param_decls or ())) if isinstance(each, str) and each.startswith("-"))
    written = (declared or (f"--{name.replace('_', '-')}",)) if isinstance(info, typer.models.OptionInfo) else ()
    return Parameter(name, kind, written, parser.__name__ if parser is not None else None)
