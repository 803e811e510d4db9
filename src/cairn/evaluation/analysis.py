"""The tidy table read as trajectories: one report for a run, for several sizes, or for the results of others."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cairn.checkpoint.format import read
from cairn.checkpoint.format.place import is_store, place
from cairn.errors import InputError, NotFoundError
from cairn.evaluation import curves, harness_results
from cairn.evaluation.measure import ResultRow, stored_rows

Curves = dict[str, dict[int, float]]
"""run -> step -> value."""


def table(sources: Iterable[str | Path], tokens_per_step: int | None = None) -> list[ResultRow]:
    """Rows of runs (what was measured of their checkpoints; nothing is measured now) and of harness result files, folders or zips."""
    rows: list[ResultRow] = []
    for source in map(place, sources):
        if source.is_dir() and read.list_checkpoints(source):
            found = stored_rows(source)
            if not found:
                raise NotFoundError(f"Nothing was measured of the run {source} yet; measure it with cairn evaluate {source}.")
            rows += found
        elif is_store(source):
            raise NotFoundError(f"There is no run {source}; result files of others are read from this machine.")
        else:
            rows += harness_results.load(source, tokens_per_step)
    return rows


def trajectory(
    sources: Iterable[str | Path],
    *,
    tasks: Collection[str] | None = None,
    reference: Iterable[str | Path] = (),
    tokens_per_step: int | None = None,
    plot: str | Path | None = None,
    csv: str | Path | None = None,
) -> TrajectoryReport:
    """Read measured runs as curves: phases, smoothness, similarity over sizes, early ranking. Measures nothing.

    Parameters
    ----------
    sources
        Measured runs, or result files of lm-evaluation-harness (a file, a folder, a zip).
    tasks
        Only these tasks; default: all.
    reference
        Runs or result files that say what is usual at equal tokens.
    tokens_per_step
        Tokens of a step, for result files that count in steps.
    plot, csv
        Also draw the curves into this PNG file, and write the tidy table into this one.

    Raises
    ------
    NotFoundError
        Where nothing was measured yet.
    InputError
        Where the table has no rows of checkpoints of a run.

    Examples
    --------
    >>> [task.verdict for task in cairn.trajectory(["runs/a"]).tasks]  # doctest: +SKIP
    """
    from cairn.evaluation.trajectory import draw, write_csv

    rows = [row for row in table(sources, tokens_per_step) if tasks is None or row.task in tasks]
    report = analyse(rows, table(reference, tokens_per_step))
    if plot is not None:
        draw(rows, plot)
    if csv is not None:
        write_csv(rows, csv)
    return report


def curves_of(rows: Iterable[ResultRow], task: str | Callable[[str], bool], metric: str) -> Curves:
    """The curves of a task, or the mean of all tasks that a function accepts, at the checkpoints where none of them is missing."""
    wanted = task if callable(task) else lambda name: name == task
    found: dict[str, dict[int, dict[str, float]]] = {}
    tasks = set()
    for row in rows:
        if row.step is not None and row.metric == metric and wanted(row.task):
            found.setdefault(row.run, {}).setdefault(row.step, {})[row.task] = row.value
            tasks.add(row.task)
    means = {run: {step: float(np.mean(list(v.values()))) for step, v in sorted(steps.items()) if len(v) == len(tasks)} for run, steps in found.items()}
    return {run: curve for run, curve in sorted(means.items()) if curve}


def after(curves_: Mapping[str, Mapping[int, float]], step: int) -> Curves:
    """Only the checkpoints from `step` on."""
    return {run: {s: value for s, value in curve.items() if s >= step} for run, curve in curves_.items()}


@dataclass(frozen=True)
class TaskOfRun:
    """One task of one run: its last value, the phase of its last checkpoint, tokens at its onset, how smooth it is, and, with
    reference runs, how many of their standard deviations it lies from their mean at equal tokens, with a verdict."""

    run: str
    task: str
    metric: str
    protocol: str
    checkpoints: int
    last: float
    phase: str
    onset_tokens: int | None
    smoothness: curves.Smoothness
    distance: float | None = None
    verdict: str | None = None


@dataclass(frozen=True)
class TaskAcross:
    """One task over several runs: similarity on all common checkpoints and after the floor (mean and least), and the decision step."""

    task: str
    metric: str
    protocol: str
    runs: int
    similarity: tuple[float, float]
    after_floor: tuple[float, float] | None
    decision_step: int | None


@dataclass(frozen=True)
class TrajectoryReport:
    """What `analyse` found."""

    tasks: list[TaskOfRun] = field(default_factory=list)
    across: list[TaskAcross] = field(default_factory=list)


def analyse(rows: Sequence[ResultRow], reference: Sequence[ResultRow] = ()) -> TrajectoryReport:
    """Phase, smoothness and verdict of every task of every run, similarity and ranking of every task over the runs.

    Curves of different protocols are never mixed. Metrics for which guessing is unknown have no floor.
    """
    groups: dict[tuple[str, str, str], dict[str, list[ResultRow]]] = {}
    for row in rows:
        if row.step is not None:
            groups.setdefault((row.task, row.metric, row.protocol), {}).setdefault(row.run, []).append(row)
    if not groups:
        raise InputError("The table has no rows of checkpoints of a run, so there is no trajectory to read.")
    report = TrajectoryReport()
    for key, runs in groups.items():
        for run in runs:
            runs[run].sort(key=lambda row: row.step or 0)
        ours = [_task_of_run(*key, run, points, reference) for run, points in runs.items()]
        report.tasks.extend(ours)
        if len(runs) > 1:
            report.across.append(_across(*key, runs))
    return report


def _task_of_run(task: str, metric: str, protocol: str, run: str, points: Sequence[ResultRow], reference: Sequence[ResultRow]) -> TaskOfRun:
    values, errors = [p.value for p in points], [0.0 if math.isnan(p.stderr) else p.stderr for p in points]
    tokens = [p.tokens if p.tokens is not None else p.step or 0 for p in points]
    chance = points[0].chance
    found = curves.phases(values, errors, chance, tokens) if chance is not None else ["-"] * len(points)
    begin = curves.onset(values, errors, chance) if chance is not None else None
    distance = _distance(points[-1], reference)
    return TaskOfRun(
        run,
        task,
        metric,
        protocol,
        len(points),
        values[-1],
        found[-1],
        tokens[begin] if begin is not None else None,
        curves.smoothness(values, errors),
        distance,
        None if distance is None else "ok" if distance >= -2 else "stalled" if found[-1] != "rise" else "watch",
    )


def _distance(point: ResultRow, reference: Sequence[ResultRow]) -> float | None:
    """Standard deviations of the reference runs from their mean, each at its last checkpoint with no more tokens than the point."""
    newest: dict[str, ResultRow] = {}
    for row in reference:
        alike = (row.task, row.metric, row.protocol) == (point.task, point.metric, point.protocol)
        if alike and row.tokens is not None and point.tokens is not None and row.tokens <= point.tokens:
            newest[row.run] = max(newest.get(row.run, row), row, key=lambda r: r.tokens or 0)
    values = [row.value for row in newest.values()]
    if len(values) < 3 or np.std(values) == 0:
        return None
    return float((point.value - np.mean(values)) / np.std(values, ddof=1))


def _across(task: str, metric: str, protocol: str, runs: dict[str, list[ResultRow]]) -> TaskAcross:
    all_of = {run: {p.step or 0: p.value for p in points} for run, points in runs.items()}
    later: Curves = {}
    for run, points in runs.items():
        begin = curves.onset([p.value for p in points], [p.stderr for p in points], points[0].chance) if points[0].chance is not None else 0
        if begin is not None:
            later[run] = {p.step or 0: p.value for p in points[begin:]}
    decided = curves.decision_step(all_of)[0] if set.intersection(*(set(curve) for curve in all_of.values())) else None
    return TaskAcross(task, metric, protocol, len(runs), curves.similarity(all_of), curves.similarity(later) if len(later) > 1 else None, decided)
