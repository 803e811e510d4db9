"""How commands speak: results on stdout (one JSON document with --json), everything else on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Annotated, Any

import typer


class StateChoice(Enum):
    """State of training that a resume or fork may begin anew, when asked by name."""

    optimizer = "optimizer"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Settings = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options as dotted.key=value.")]
Fresh = Annotated[list[StateChoice] | None, typer.Option(help="State that is to begin anew instead of being restored.")]
AllowNonFinite = Annotated[bool, typer.Option("--allow-non-finite", help="Write values that are not finite instead of refusing them.")]
Base = Annotated[str | None, typer.Option(help="Of an adapter, the checkpoint that it was trained on, where that is not found by itself.")]
Out = Annotated[str, typer.Option("-o", "--out", help="Where the new checkpoint goes (a path, or the URL of a store); must not exist.")]


class Precision(Enum):
    """What a model computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


Device = Annotated[str | None, typer.Option(help="Where the model computes: cpu, cuda, cuda:1, mps; default: the accelerator if there is one.")]


def emit(document: Any) -> None:
    """Print a JSON document; what JSON can not say (nan) becomes null."""
    print(json.dumps(plain(document), indent=2, default=str))


def say(text: str) -> None:
    """One line for a person, on stderr."""
    print(text, file=sys.stderr, flush=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout, as wide as it needs where nobody watches."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        drawn.add_row(*(_text(value) for value in row))
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(drawn)


def values(pairs: dict[str, Any]) -> None:
    """Name and value, one pair a line, on stdout."""
    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        print(f"{name:<{width}}  {_text(value)}")


def size(count: float) -> str:
    """Bytes for a person."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


class Bytes:
    """Progress of something that counts bytes, drawn on stderr where a person watches."""

    def __init__(self, what: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=console, disable=not console.is_terminal, transient=True
        )
        self._task = self._bar.add_task(what, total=None)

    def __call__(self, done: int, total: int | None = None) -> None:
        self._bar.update(self._task, completed=done, total=total)

    def __enter__(self) -> Bytes:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value)) or "-"
    return f"{value:,}" if isinstance(value, int) else str(value)


def plain(value: Any) -> Any:
    """A value as JSON can say it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
