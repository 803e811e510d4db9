"""How steadily a run trained: spikes of loss and gradient norm, their drift, and what flows through its checkpoints.

    spike score = share of the steps whose value is more than `threshold` standard deviations away from the mean of the
    `window` steps before

of which the first `window` steps are not judged ("2 OLMo 2 Furious", section 3, there with 1000 steps and 7 deviations; here by
default 128 and 6, for runs of hundreds of steps). It reads metrics.jsonl; only the signals open checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cairn import plotting
from cairn.checkpoint.format import read
from cairn.checkpoint.format.place import place
from cairn.device import choose, computes
from cairn.errors import InputError, NotFoundError
from cairn.training.loggers import METRICS, read_rows

if TYPE_CHECKING:
    from cairn.checkpoint.format.read import Checkpoint

WINDOW, THRESHOLD = 128, 6.0
WATCHED = ("loss", "grad_norm")


@dataclass(frozen=True)
class Spikes:
    """The spikes of one figure of a run: `score` is their share of the `judged` steps, None where none could be judged; `steps` are where they stand."""

    score: float | None
    judged: int
    steps: list[int]


@dataclass(frozen=True)
class Signal:
    """What flows through one checkpoint (`cairn.models.signals`)."""

    checkpoint: str
    step: int | None
    activation_growth: float
    gradient_growth: float
    largest_logit: float


@dataclass(frozen=True)
class StabilityReport:
    """One run, or one stage of a run of several."""

    run: str
    steps: int
    loss: Spikes
    grad_norm: Spikes
    grad_norm_growth: float | None
    """How many times larger the gradient norm is at the end than after the warm-up (medians of the last and of the second tenth)."""
    signals: list[Signal]

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def spikes(values: ArrayLike, window: int = WINDOW, threshold: float = THRESHOLD) -> NDArray[np.intp]:
    """Positions of the spikes in a series, the first possible one being `window`; a value that is not finite is always one and
    is left out of the means and deviations."""
    series = np.asarray(values, dtype=np.float64)
    if len(series) <= window:
        return np.zeros(0, dtype=np.intp)
    finite = np.where(np.isfinite(series), series, np.nan)
    before = np.lib.stride_tricks.sliding_window_view(finite, window)[:-1]
    known = np.isfinite(before).any(axis=1)
    mean, deviation = np.zeros(len(before)), np.zeros(len(before))
    mean[known], deviation[known] = np.nanmean(before[known], axis=1), np.nanstd(before[known], axis=1)
    judged = finite[window:]
    return window + np.flatnonzero(np.isnan(judged) | (np.abs(judged - mean) > threshold * deviation))


def growth(values: ArrayLike) -> float | None:
    """Median of the last tenth of a series over that of its second tenth; None for less than twenty values."""
    series = np.asarray(values, dtype=np.float64)
    tenth = len(series) // 10
    return float(np.median(series[-tenth:]) / np.median(series[tenth : 2 * tenth])) if tenth >= 2 else None


@computes
def stability(
    run: str | Path,
    *,
    window: int = WINDOW,
    threshold: float = THRESHOLD,
    signals: bool = False,
    sequences: int = 8,
    device: Any = None,
    progress: Callable[[str], object] = lambda text: None,
) -> list[StabilityReport]:
    """How steadily a run trained; of a run of several stages one report each. With `signals` every checkpoint is opened too, and
    read on `sequences` held-out sequences of its own data, on `device` (as `cairn.device.choose`).

    Raises `NotFoundError` if the run has logged nothing, `InputError` where signals are asked of a family that cairn does not build.
    """
    if window < 2 or threshold <= 0 or sequences < 1:
        raise InputError("A window has at least 2 steps, and the threshold and the number of sequences are positive.")
    folders = [path for path in read.list_stages(run) if (path / METRICS).exists()] or [place(run)]
    found = []
    for folder in folders:
        rows = [row for row in read_rows(folder / METRICS) if all(row.get(key) is not None for key in WATCHED)]
        if not rows:
            raise NotFoundError(f"{folder} has no {METRICS} with a logged step: name the directory of a run.")
        series = {key: [row[key] for row in rows] for key in WATCHED}
        places = {key: spikes(values, window, threshold) for key, values in series.items()}
        judged = max(0, len(rows) - window)
        spiked = {key: Spikes(len(at) / judged if judged else None, judged, [rows[index]["step"] for index in at]) for key, at in places.items()}
        flowing = _signals(folder, sequences, progress) if signals else []
        found.append(StabilityReport(str(folder), len(rows), spiked["loss"], spiked["grad_norm"], growth(series["grad_norm"]), flowing))
    return found


def _signals(run: Path, sequences: int, progress: Callable[[str], object]) -> list[Signal]:
    found = []
    for path in read.list_checkpoints(run):
        progress(f"signals of {path}")
        found.append(signal_of(read.open(path), sequences))
    return found


def signal_of(checkpoint: Checkpoint, sequences: int = 8) -> Signal:
    """What flows through one checkpoint on held-out sequences of the data that it was trained on."""
    import torch

    from cairn.evaluation.measure import recipe_behind
    from cairn.models.decoder import Decoder
    from cairn.models.signals import signals
    from cairn.training import recipe as recipes
    from cairn.training.sources import open_recorded

    where = choose()
    model, written = checkpoint.model(device=where), recipe_behind(checkpoint)
    if not isinstance(model, Decoder) or written is None:
        raise InputError(f"{checkpoint.path}: signals are read from decoders that cairn builds and whose recipe is known.")
    recipe = recipes.load(written)
    samples = open_recorded(recipe.data, recipe.seed, checkpoint.tokenizer)[1].held_out(sequences)
    tokens, weights = torch.from_numpy(samples.tokens).to(where), torch.from_numpy(samples.weights).to(where)
    found = signals(model, tokens[:, :-1], tokens[:, 1:], weights)
    return Signal(checkpoint.path.name, checkpoint.step, found.activation_growth, found.gradient_growth, found.largest_logit)


def draw(reports: Sequence[StabilityReport], path: str | Path) -> Path:
    """Loss and gradient norm of each run over its steps, spikes marked; below, where there are signals, how they went. Writes a PNG."""
    kinds = ("activation_growth", "gradient_growth", "largest_logit")
    figure, axes = plotting.panels(len(WATCHED) + (len(kinds) if any(report.signals for report in reports) else 0))
    for report in reports:
        rows, name = {row["step"]: row for row in read_rows(Path(report.run) / METRICS)}, Path(report.run).name
        for axis, key in zip(axes, WATCHED, strict=False):
            (line,) = axis.plot(list(rows), [row[key] for row in rows.values()], linewidth=0.8, label=name)
            at: list[int] = getattr(report, key).steps
            axis.plot(at, [rows[step][key] for step in at], "v", color=line.get_color(), markersize=6)
            axis.set(xlabel="step", title=f"{key.replace('_', ' ')}, spikes marked", yscale="log")
        for axis, key in zip(axes[len(WATCHED) :], kinds, strict=False):
            axis.plot([signal.step for signal in report.signals], [getattr(signal, key) for signal in report.signals], marker="o", label=name)
            axis.set(xlabel="step", title=key.replace("_", " "))
    for axis in axes:
        axis.legend()
    return plotting.save(figure, path)
