"""Trajectories: figures of a run over its tokens, drawn with their error bands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cairn.evaluate.measure import Row
from cairn.evaluate.statistics import Z95


def draw(rows: Sequence[Row], path: str | Path) -> Path:
    """One panel per task and metric, a line per run over its tokens with 95 % bands, chance dashed; writes a PNG."""
    series: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        if row.tokens is not None:
            series.setdefault((row.task, row.metric), {}).setdefault(row.run, []).append(row)
    figure, axes = panels(len(series))
    for axis, ((task, metric), runs) in zip(axes, series.items(), strict=True):
        for run, points in runs.items():
            points.sort(key=lambda row: row.tokens or 0)
            x, y = [p.tokens / 1e6 for p in points if p.tokens is not None], [p.value for p in points]
            axis.plot(x, y, marker="o", markersize=3, label=run)
            axis.fill_between(x, [p.value - Z95 * p.stderr for p in points], [p.value + Z95 * p.stderr for p in points], alpha=0.2)
            if points[0].chance is not None:
                axis.axhline(points[0].chance, linestyle="--", color="grey", linewidth=1)
        axis.set(xlabel="tokens (millions)", title=f"{task}: {metric.replace('_', ' ')}")
        axis.legend()
    return written(figure, path)


def draw_run(metrics: Sequence[Mapping[str, Any]], rows: Sequence[Row], path: str | Path, marks: Mapping[str, float] | None = None) -> Path:
    """Training loss over tokens beside held-out bits per byte at the checkpoints; `marks` names moments (in tokens)."""
    figure, (left, right) = panels(2)
    left.plot([m["tokens"] / 1e6 for m in metrics], [m["loss"] for m in metrics], linewidth=1)
    left.set(xlabel="tokens (millions)", ylabel="nats per token", title="training loss")
    points = sorted((r for r in rows if r.metric == "bits_per_byte" and r.tokens is not None), key=lambda r: r.tokens or 0)
    right.errorbar([(p.tokens or 0) / 1e6 for p in points], [p.value for p in points], yerr=[Z95 * p.stderr for p in points], marker="o", capsize=3)
    right.set(xlabel="tokens (millions)", ylabel="bits per byte", title="held-out text, each checkpoint")
    for name, tokens in (marks or {}).items():
        for axis in (left, right):
            axis.axvline(tokens / 1e6, linestyle=":", color="tab:red", linewidth=1)
        left.annotate(name, (tokens / 1e6, left.get_ylim()[1]), rotation=90, va="top", ha="right", fontsize=8, color="tab:red")
    return written(figure, path)


def panels(count: int) -> tuple[Any, list[Any]]:
    """A figure with so many axes side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, max(count, 1), figsize=(5 * max(count, 1), 3.6), squeeze=False, layout="constrained")
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    return figure, list(axes[0])


def written(figure: Any, path: str | Path) -> Path:
    """Write a figure as a PNG and close it."""
    from matplotlib import pyplot

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return Path(path)
