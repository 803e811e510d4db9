"""The rows of a run for those who watch with TensorBoard or Weights & Biases: the same numbers under the same names, at the same steps.

metrics.jsonl stays the truth. A run that was interrupted writes the rows after its last checkpoint once more; TensorBoard is told
to forget them, and Weights & Biases, which forgets nothing, shows the later row of a step as `_step` goes on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from cairn.errors import InputError
from cairn.training.loggers import Logger

FOLDER = "tensorboard"
"""Folder of a run directory in which TensorBoard finds its files."""


def trackers(names: Iterable[str], run: Path, recipe: Mapping[str, Any], step: int) -> list[Logger]:
    """A logger for each name; the run goes on after `step`. Raises `InputError` where the extra `track` is not installed."""
    makers = {"tensorboard": lambda: TensorBoard(run, step), "wandb": lambda: WeightsAndBiases(run, recipe)}
    return [makers[name]() for name in dict.fromkeys(names)]


class TensorBoard(Logger):
    """Rows as scalars and samples as text, in `tensorboard/` of the run."""

    def __init__(self, run: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError("track: tensorboard is not installed; pip install 'cairn-lm[track]'.") from None
        self._writer = SummaryWriter(str(run / FOLDER), purge_step=step + 1 if step else None)

    def row(self, row: dict[str, Any], *, awaits: bool = False) -> None:
        self.observed(row["step"], row)

    def observed(self, step: int, figures: Mapping[str, Any]) -> None:
        for name, value in scalars(figures).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def sample(self, step: int, tokens: int, prompt: str, text: str) -> None:
        self._writer.add_text("sample", prompt + text, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases(Logger):
    """Rows of a run of Weights & Biases that bears the run directory's name; the environment says which account, or WANDB_MODE=offline."""

    def __init__(self, run: Path, recipe: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise InputError("track: wandb is not installed; pip install 'cairn-lm[track]'.") from None
        # The same directory is the same run, however often it is interrupted.
        identity = blake3(str(run.resolve()).encode()).hexdigest()[:16]
        project = os.environ.get("WANDB_PROJECT", "cairn")
        try:
            self._run = wandb.init(project=project, dir=str(run), id=identity, name=run.name, config=dict(recipe), resume="allow", save_code=False)
        except wandb.errors.Error as error:
            said = " ".join(str(error).split()).rstrip(".")
            raise InputError(f"track: wandb refuses: {said}. Log in (`wandb login`), set WANDB_MODE=offline, or leave track out.") from None
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def row(self, row: dict[str, Any], *, awaits: bool = False) -> None:
        self.observed(row["step"], row)

    def observed(self, step: int, figures: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **scalars(figures)})

    def sample(self, step: int, tokens: int, prompt: str, text: str) -> None:
        self._run.log({"step": step, "sample": prompt + text})

    def close(self) -> None:
        self._run.finish()


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row, by name."""
    return {name: float(value) for name, value in row.items() if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)}
