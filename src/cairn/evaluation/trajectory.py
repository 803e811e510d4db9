"""Trajectories: figures of a run over its tokens (or samples), drawn with their error bands."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from cairn import plotting
from cairn.evaluation.measure import ResultRow
from cairn.statistics import interval


def draw(rows: Sequence[ResultRow], path: str | Path) -> Path:
    """One panel per task and metric, a line per run over its tokens (or samples) with 95 % bands, chance dashed; writes a PNG."""
    series: dict[tuple[str, str], dict[str, list[ResultRow]]] = {}
    for row in rows:
        if row.units is not None:
            series.setdefault((row.task, row.metric), {}).setdefault(row.run, []).append(row)
    figure, axes = plotting.panels(len(series))
    for axis, ((task, metric), runs) in zip(axes, series.items(), strict=True):
        for run, points in runs.items():
            points.sort(key=lambda row: row.units or 0)
            x, y = [p.units / 1e6 for p in points if p.units is not None], [p.value for p in points]
            axis.plot(x, y, marker="o", markersize=3, label=run)
            axis.fill_between(x, *zip(*(interval(p.value, p.stderr, p.n) for p in points), strict=True), alpha=0.2)
            if points[0].chance is not None:
                axis.axhline(points[0].chance, linestyle="--", color="grey", linewidth=1)
        axis.set(xlabel=f"{next(iter(runs.values()))[0].unit} (millions)", title=f"{task}: {metric.replace('_', ' ')}")
        axis.legend()
    return plotting.save(figure, path)


def sparkline(values: Sequence[float]) -> str:
    """A curve in one line of a terminal, from its lowest to its highest value."""
    low, high = min(values), max(values)
    return "".join(BARS[round((value - low) / (high - low) * (len(BARS) - 1))] if high > low else BARS[0] for value in values)


BARS = "▁▂▃▄▅▆▇█"


def curves_in_words(rows: Sequence[ResultRow]) -> list[tuple[str, str, str, str, float, float]]:
    """(run, task, metric, curve, first value, last value) of every curve with more than one checkpoint."""
    series: dict[tuple[str, str, str], list[ResultRow]] = {}
    for row in rows:
        if row.units is not None:
            series.setdefault((row.run, row.task, row.metric), []).append(row)
    for points in series.values():
        points.sort(key=lambda row: row.units or 0)
    return [(*key, sparkline([p.value for p in points]), points[0].value, points[-1].value) for key, points in series.items() if len(points) > 1]


def write_csv(rows: Sequence[ResultRow], path: str | Path) -> Path:
    """The tidy table as a CSV file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [column.name for column in fields(ResultRow)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    return Path(path)


def draw_run(metrics: Sequence[Mapping[str, Any]], rows: Sequence[ResultRow], path: str | Path, marks: Mapping[str, float] | None = None) -> Path:
    """Training loss over tokens beside held-out bits per byte at the checkpoints; `marks` names moments (in tokens)."""
    figure, (left, right) = plotting.panels(2)
    left.plot([m["tokens"] / 1e6 for m in metrics], [m["loss"] for m in metrics], linewidth=1)
    left.set(xlabel="tokens (millions)", ylabel="nats per token", title="training loss")
    points = sorted((r for r in rows if r.metric == "bits_per_byte" and r.tokens is not None), key=lambda r: r.tokens or 0)
    ends = [(p.value, interval(p.value, p.stderr, p.n)) for p in points]
    sides = [[value - low for value, (low, _) in ends], [high - value for value, (_, high) in ends]]
    right.errorbar([(p.tokens or 0) / 1e6 for p in points], [p.value for p in points], yerr=sides, marker="o", capsize=3)
    right.set(xlabel="tokens (millions)", ylabel="bits per byte", title="held-out text, each checkpoint")
    for name, tokens in (marks or {}).items():
        for axis in (left, right):
            axis.axvline(tokens / 1e6, linestyle=":", color="tab:red", linewidth=1)
        left.annotate(name, (tokens / 1e6, left.get_ylim()[1]), rotation=90, va="top", ha="right", fontsize=8, color="tab:red")
    return plotting.save(figure, path)
