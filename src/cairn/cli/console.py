"""How commands speak: results on stdout (one JSON document with --json), everything else on stderr."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from cairn.cli import places


class StateChoice(Enum):
    """State of training that a resume or fork may begin anew, when asked by name."""

    optimizer = "optimizer"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Settings = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options as dotted.key=value.")]
Fresh = Annotated[list[StateChoice] | None, typer.Option(help="State that is to begin anew instead of being restored.")]
AllowNonFinite = Annotated[bool, typer.Option("--allow-non-finite", help="Write values that are not finite instead of refusing them.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what it would cost, memory included, and leave.")]
Base = Annotated[str | None, places.anywhere("The checkpoint that an adapter was trained on, where that is not found by itself.", "--base")]
Out = Annotated[str, places.anywhere("Where the new checkpoint goes; must not exist.", "-o", "--out")]
Run = Annotated[Path | None, places.local("The new run directory.", "--run", "--run-directory")]
Plot = Annotated[Path | None, places.local("Also draw it into this PNG file.", "--plot")]

_document: TextIO | None = None
_saved: int | None = None


def tell(piece: str) -> None:
    """Print a piece of a text that is still being written."""
    sys.stdout.write(piece)
    sys.stdout.flush()


@contextmanager
def one_document() -> Iterator[None]:
    """For a command with --json: only `emit` reaches stdout. What else is printed, by us, by a library or by a child process, goes to stderr."""
    global _document, _saved
    out = sys.stdout
    out.flush()
    _document = out
    if _descriptor(out) == 1:
        _saved = os.dup(1)
        os.dup2(2, 1)
        _document = os.fdopen(os.dup(_saved), "w", encoding="utf-8")
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = out
        if _saved is not None:
            out.flush()  # what a library kept for our stdout belongs to stderr, too
            os.dup2(_saved, 1)
            os.close(_saved)
            _document.close()
        _document = _saved = None


@contextmanager
def handed_over() -> Iterator[None]:
    """While other processes do this command in our place, stdout is theirs: the first of them prints the document."""
    if _saved is None:
        yield
        return
    os.dup2(_saved, 1)
    try:
        yield
    finally:
        os.dup2(2, 1)


def launched_instead(parallel: Any) -> bool:
    """Where a recipe wants several processes: let workers do this command line, with our stdout. Whether they did."""
    from cairn.training.parallel import launched_instead as launch

    with handed_over():
        return launch(parallel)


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None  # a stream in memory has none


class Precision(Enum):
    """What a model computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


Device = Annotated[str | None, typer.Option(help="Where the model computes: cpu, cuda, cuda:1, mps; default: the accelerator if there is one.")]


def emit(document: Any) -> None:
    """Print a JSON document; what JSON cannot say (nan) becomes null."""
    print(json.dumps(plain(document), indent=2, default=str), file=_document or sys.stdout, flush=True)


def say(text: str) -> None:
    """One line for a person, on stderr."""
    print(text, file=sys.stderr, flush=True)


def width() -> int | None:
    """Columns of the terminal that shows stdout; None where none does."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout: as wide as it needs in a file or a pipe; on a terminal that is too narrow, each row as a block of name and value."""
    lines = [[_text(value) for value in row] for row in rows]
    most = width()
    if most is None:
        _plain_table(columns, lines)
        return
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    drawn = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for line in lines:
        drawn.add_row(*line)
    console = Console(highlight=False, markup=False, emoji=False, width=most)
    if Measurement.get(console, console.options.update(max_width=10**6), drawn).minimum <= most:
        console.print(drawn)
        return
    for number, line in enumerate(lines):
        if number:
            print()
        values(dict(zip(columns, line, strict=True)))


def _plain_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    widths = [max(len(str(cell)) for cell in column) for column in zip(columns, *lines, strict=True)]
    for line in (columns, ["-" * each for each in widths], *lines):
        print("  ".join(cell.ljust(each) for cell, each in zip(line, widths, strict=True)).rstrip())


def values(pairs: dict[str, Any]) -> None:
    """Name and value, one pair a line, on stdout; long values go on under their beginning."""
    longest = max(map(len, pairs), default=0)
    most = width()
    for name, value in pairs.items():
        line = f"{name:<{longest}}  {_text(value)}"
        if most is not None and len(line) > most:
            line = "\n".join(textwrap.wrap(line, most, subsequent_indent=" " * (longest + 2), break_on_hyphens=False)) or line
        print(line)


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
            TextColumn(what), BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn(), console=console, disable=not console.is_terminal, transient=True
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
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value)) or "-"
    return f"{value:,}" if isinstance(value, int) else str(value)


def plain(value: Any) -> Any:
    """A value as JSON can say it."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()  # a number of numpy
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return value
