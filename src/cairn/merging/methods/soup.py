"""Soups: averages of runs that began from one checkpoint.

A greedy soup takes the checkpoints from the best to the worst and keeps each that does not make the average worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cairn.checkpoint.format import read
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating import stream
from cairn.device import computes
from cairn.errors import InputError
from cairn.merging.methods.average import Average
from cairn.merging.target import Bench, MergeTarget


def greedy_order(values: Sequence[float], of_average: Callable[[list[int]], float], better: Callable[[float, float], bool]) -> tuple[list[int], list[float]]:
    """Which checkpoints a greedy soup takes, given the value of each alone and of the average of any; and its value after each try.

    Model soups, recipe 1: from the best on, a checkpoint stays if the average with it is at least as good as without. One whose value is
    not finite is left out. Raises `InputError` where none is.
    """
    known = [i for i, value in enumerate(values) if math.isfinite(value)]
    if not known:
        raise InputError("No checkpoint of the soup measures as a finite number; the checkpoints or the data are damaged.")
    order = sorted(known, key=lambda i: values[i], reverse=better(1.0, 0.0))
    taken, best, history = [order[0]], values[order[0]], [values[order[0]]]
    for index in order[1:]:
        value = of_average([*taken, index])
        history.append(value)
        if math.isfinite(value) and not better(best, value):
            taken, best = [*taken, index], value
    return taken, history


@computes
def greedy_soup(checkpoints: Sequence[str | Path | Checkpoint], out: str | Path, objective: MergeTarget, *, device: Any = None, **options: Any) -> Checkpoint:
    """Write the greedy soup of checkpoints, chosen by the objective's `select` data; lineage keeps every try.

    Raises `InputError` or `MismatchError` before anything is written.
    """
    opened = stream.opened_for(Average(), checkpoints)
    bench = Bench(opened)
    alone = [bench.alone(checkpoint, objective.select).value for checkpoint in opened]

    def of_average(chosen: list[int]) -> float:
        return bench.score(Average(), objective.select, [opened[i] for i in chosen]).value

    taken, history = greedy_order(alone, of_average, objective.better)
    also = {"greedy": {"alone": alone, "taken": taken, "after_each_try": history, "objective": objective.described}}
    return stream.apply(Average(), [opened[i] for i in taken], out, name="greedy-soup", also=also, **options)


def uniform_soup(runs: Sequence[str | Path], out: str | Path, *, last: int = 1, **options: Any) -> Checkpoint:
    """Mean over runs, each counted by the mean of its last checkpoints: the newest of each, or the newest `last`."""
    chosen = [path for run in runs for path in (read.list_checkpoints(run)[-last:] or [Path(run)])]
    return stream.apply(Average(), chosen, out, name="uniform-soup", **options)
