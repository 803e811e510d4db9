"""Where a run's figures go: metrics.jsonl always, a progress line on the terminal when someone watches."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from cairn.checkpoint.format import documents

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file. A last line that a kill left unfinished is passed over."""
    yield from documents.read_rows(path)


def drop_rows_after(path: Path, step: int) -> None:
    """Remove the rows of steps later than `step`, which a resumed run will write again. Atomic."""
    if path.exists():
        later = documents.rows_and_lines(path)
        documents.keep(path, b"".join(line for line, row in later if row is None or not isinstance(row.get("step"), int) or row["step"] <= step))


class Logger:
    """Base: takes rows and samples and does nothing with them (what ranks other than the first use)."""

    def row(self, row: dict[str, Any]) -> None:
        """One logged step."""

    def sample(self, step: int, tokens: int, prompt: str, text: str) -> None:
        """A text that the model wrote."""

    def message(self, text: str) -> None:
        """One plain sentence for whoever watches."""

    def close(self) -> None:
        """No more will come."""


class FileLogger(Logger):
    """Rows to metrics.jsonl and samples to samples.jsonl of the run directory, each flushed as it comes."""

    def __init__(self, run: Path) -> None:
        self._metrics = (run / METRICS).open("a", encoding="utf-8")
        self._samples = (run / SAMPLES).open("a", encoding="utf-8")

    def row(self, row: dict[str, Any]) -> None:
        self._write(self._metrics, row)

    def sample(self, step: int, tokens: int, prompt: str, text: str) -> None:
        self._write(self._samples, {"step": step, "tokens": tokens, "prompt": prompt, "text": text})

    def _write(self, file: TextIO, row: dict[str, Any]) -> None:
        file.write(json.dumps(row) + "\n")
        file.flush()

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()


class ProgressLogger(Logger):
    """Live progress on stderr: a bar with loss, rate and time left on a terminal, a line now and then elsewhere."""

    def __init__(self, total_units: int, done_units: int, unit: str = "tokens") -> None:
        """`unit` is what the rows count: tokens or samples."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._console = Console(stderr=True, highlight=False)
        self._live = self._console.is_terminal
        self._progress = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[done]}  loss {task.fields[loss]}  {task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._total, self._unit = total_units, unit
        self._task = self._progress.add_task("", total=total_units, completed=done_units, step=0, done="", loss="-", rate="")
        self._shown = -1
        self._progress.start()

    def row(self, row: dict[str, Any]) -> None:
        done, speed = row[self._unit], row[f"{self._unit}_per_second"]
        told, rate = f"{done / 1e6:.2f}M {self._unit}", f"{speed:,.0f} {self._unit}/s"
        self._progress.update(self._task, completed=done, step=row["step"], done=told, loss=f"{row['loss']:.3f}", rate=rate)
        tenth = 10 * done // self._total
        if not self._live and tenth != self._shown:
            self._shown = tenth
            left = (self._total - done) / max(speed, 1e-9)
            print(f"step {row['step']}  {told}  loss {row['loss']:.3f}  {rate}  {left:.0f} s left", file=sys.stderr, flush=True)
        measured = {key: value for key, value in row.items() if "/" in key and isinstance(value, float)}
        if measured:
            self.message(f"step {row['step']}: " + "  ".join(f"{key} {value:.4f}" for key, value in measured.items()))

    def sample(self, step: int, tokens: int, prompt: str, text: str) -> None:
        self.message(f"step {step} writes: {(prompt + text)!r}")

    def message(self, text: str) -> None:
        self._console.print(text, markup=False)

    def close(self) -> None:
        self._progress.stop()


class Loggers(Logger):
    """Passes everything on to each of several loggers."""

    def __init__(self, *sinks: Logger) -> None:
        self._sinks = sinks

    def row(self, row: dict[str, Any]) -> None:
        for logger in self._sinks:
            logger.row(row)

    def sample(self, step: int, tokens: int, prompt: str, text: str) -> None:
        for logger in self._sinks:
            logger.sample(step, tokens, prompt, text)

    def message(self, text: str) -> None:
        for logger in self._sinks:
            logger.message(text)

    def close(self) -> None:
        for logger in self._sinks:
            logger.close()
