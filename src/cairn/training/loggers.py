"""Where a run's figures go: metrics.jsonl always, a progress line on the terminal when someone watches."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cairn.checkpoint.format import documents, kinds
from cairn.errors import DamagedError, InputError

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
AWAITS = "awaits"
"""Key of a row whose step is handed over for saving while its callbacks have yet to look at it; it goes when they have."""


class MetricsRow(kinds.File):
    """One row of metrics.jsonl; what callbacks and ingredients add stands there, too."""

    step: kinds.Whole
    tokens: kinds.Whole | None = None
    samples: kinds.Whole | None = None
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    samples_per_second: float | None = None
    mfu: float | None = None
    seconds: float | None = None


class SampleRow(kinds.File):
    """One row of samples.jsonl."""

    step: kinds.Whole
    prompt: str
    text: str


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file. Lines that a kill or a disk left unfinished are passed over."""
    for row in documents.read_rows(path, SampleRow if path.name == SAMPLES else MetricsRow):
        row.pop(AWAITS, None)
        yield row


def drop_rows_after(path: Path, step: int) -> None:
    """Remove the rows of steps later than `step`, which a resumed run will write again. Atomic."""
    if path.exists():
        later = documents.rows_and_lines(path)
        with explained(path):
            documents.keep(path, b"".join(line for line, row in later if row is None or not isinstance(row.get("step"), int) or row["step"] <= step))


def awaits_callbacks(run: Path, step: int) -> bool:
    """Whether a run was lost between the save of `step` and the callbacks that were to look at it."""
    return any(row.get("step") == step and AWAITS in row for _, row in documents.rows_and_lines(run / METRICS) if row is not None)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the system refuses into one sentence that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} could not be written: {(error.strerror or str(error)).rstrip('.')}. The run ends here; its newest checkpoint is whole, and "
            f"`cairn resume {path.parent}` goes on from it once that is mended."
        ) from error


def short(count: float) -> str:
    """A count in four characters or so: 512, 5.1k, 12M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}" if count < 999.5 * size else f"{count / size:.0f}{letter}"
    return f"{count:.3g}" if count < 10 and count != int(count) else f"{count:.0f}"


class Logger:
    """Base: takes rows and samples and does nothing with them (what ranks other than the first use)."""

    def row(self, row: dict[str, Any], *, awaits: bool = False) -> None:
        """One logged step; with `awaits`, its callbacks have yet to look at it and `observed` follows."""

    def observed(self, step: int, figures: Mapping[str, Any]) -> None:
        """What callbacks have found in the state of a step whose row is there."""

    def awaits(self, step: int) -> bool:
        """Whether the row of a step still waits for `observed`."""
        return False

    def sample(self, step: int, tokens: int, prompt: str, text: str) -> None:
        """A text that the model wrote."""

    def message(self, text: str) -> None:
        """One plain sentence for the person who watches."""

    def close(self) -> None:
        """No more will come."""


class _Lines:
    """A file of rows that grows at its end; its last row may be completed in place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with explained(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._last = self._end = os.fstat(self._fd).st_size
        for line, _ in documents.rows_and_lines(path):
            self._last = self._end - len(line)

    def add(self, row: Mapping[str, Any]) -> None:
        self._last = self._end
        self._put((json.dumps(row) + "\n").encode())

    def complete(self, row: Mapping[str, Any]) -> None:
        """Write another row over the last one, in one act: readers see the old or the new one."""
        data = json.dumps(row).encode()
        self._put(data + b" " * (self._end - self._last - len(data) - 1) + b"\n")

    def last(self) -> dict[str, Any]:
        """The last row; empty where the last line is none."""
        line = os.pread(self._fd, self._end - self._last, self._last)
        try:
            row = documents.parse(line, self.path)
        except DamagedError:
            return {}
        return row if isinstance(row, dict) else {}

    def _put(self, data: bytes) -> None:
        with explained(self.path):
            written = os.pwrite(self._fd, data, self._last)
            while written < len(data):
                written += os.pwrite(self._fd, data[written:], self._last + written)
        self._end = self._last + len(data)

    def close(self) -> None:
        os.close(self._fd)


class FileLogger(Logger):
    """Rows to metrics.jsonl and samples to samples.jsonl of the run directory, each written as it comes."""

    def __init__(self, run: Path) -> None:
        self._metrics, self._samples = _Lines(run / METRICS), _Lines(run / SAMPLES)

    def row(self, row: dict[str, Any], *, awaits: bool = False) -> None:
        self._metrics.add({**row, AWAITS: "callbacks"} if awaits else row)

    def observed(self, step: int, figures: Mapping[str, Any]) -> None:
        last = self._metrics.last()
        if last.get("step") == step:
            self._metrics.complete({**{key: value for key, value in last.items() if key != AWAITS}, **figures})

    def awaits(self, step: int) -> bool:
        last = self._metrics.last()
        return last.get("step") == step and AWAITS in last

    def sample(self, step: int, tokens: int, prompt: str, text: str) -> None:
        self._samples.add({"step": step, "tokens": tokens, "prompt": prompt, "text": text})

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()


class ProgressLogger(Logger):
    """Live progress on stderr: a bar with loss, rate and time left on a terminal of 80 columns, a line now and then elsewhere."""

    def __init__(self, total_units: int, done_units: int, unit: str = "tokens") -> None:
        """`unit` is what the rows count: tokens or samples."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._console = Console(stderr=True, highlight=False)
        self._live = self._console.is_terminal
        self._progress = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(bar_width=10),
            TextColumn("{task.percentage:>3.0f}% {task.fields[done]} loss {task.fields[loss]} {task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._total, self._unit = total_units, unit
        self._task = self._progress.add_task("", total=total_units, completed=done_units, step=0, done="", loss="-", rate="")
        self._shown = -1
        self._progress.start()

    def row(self, row: dict[str, Any], *, awaits: bool = False) -> None:
        done, speed = row[self._unit], row[f"{self._unit}_per_second"]
        told, rate = f"{short(done)} {self._unit}", f"{short(speed)}/s"
        self._progress.update(self._task, completed=done, step=row["step"], done=told, loss=f"{row['loss']:.3f}", rate=rate)
        tenth = 10 * done // self._total
        if not self._live and tenth != self._shown:
            self._shown = tenth
            left = (self._total - done) / max(speed, 1e-9)
            print(f"step {row['step']}  {told}  loss {row['loss']:.3f}  {short(speed)} {self._unit}/s  {left:.0f} s left", file=sys.stderr, flush=True)
        self.observed(row["step"], row)

    def observed(self, step: int, figures: Mapping[str, Any]) -> None:
        measured = {key: value for key, value in figures.items() if "/" in key and isinstance(value, float)}
        if measured:
            self.message(f"step {step}: " + "  ".join(f"{key} {value:.4f}" for key, value in measured.items()))

    def sample(self, step: int, tokens: int, prompt: str, text: str) -> None:
        self.message(f"step {step} writes: {(prompt + text)!r}")

    def message(self, text: str) -> None:
        # The terminal breaks lines where it is narrow: text that is copied from it is whole.
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


class Loggers(Logger):
    """Passes everything on to each of several loggers."""

    def __init__(self, *loggers: Logger) -> None:
        self._loggers = loggers

    def row(self, row: dict[str, Any], *, awaits: bool = False) -> None:
        for logger in self._loggers:
            logger.row(row, awaits=awaits)

    def observed(self, step: int, figures: Mapping[str, Any]) -> None:
        for logger in self._loggers:
            logger.observed(step, figures)

    def awaits(self, step: int) -> bool:
        return any(logger.awaits(step) for logger in self._loggers)

    def sample(self, step: int, tokens: int, prompt: str, text: str) -> None:
        for logger in self._loggers:
            logger.sample(step, tokens, prompt, text)

    def message(self, text: str) -> None:
        for logger in self._loggers:
            logger.message(text)

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()
