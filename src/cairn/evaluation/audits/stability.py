"""How good is an evaluation itself? Whether its score rises with training (stability), and whether base models stand in the order
of the models made from them (consistency); both by Kendall's tau-b ("Toward Stable and Consistent Evaluation Results").

A constant score has no tau: it stays undefined, None, and is never 0. Tau rewards any drift, so it is read beside the test
that the last score is above chance at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cairn.checkpoint.format import read
from cairn.checkpoint.format.read import Checkpoint
from cairn.errors import InputError
from cairn.evaluation.compute import Compute
from cairn.evaluation.items import ItemMeasurement, observe, right_of
from cairn.evaluation.measure import Measurement
from cairn.options import configure
from cairn.randomness import seed_for, uniform
from cairn.statistics import binomial_error, bootstrap, error, kendall, kendall_p


@dataclass(frozen=True)
class Stability:
    """Kendall's tau-b of a score with the amount of training; None where it is undefined."""

    tau: float | None
    interval: tuple[float, float] | None
    """95 %, items drawn again; None without single items."""
    p: float | None
    """One-sided, under random orders of the checkpoints."""
    checkpoints: int
    violations: int
    """Neighbouring checkpoints of which the later scores lower."""
    final: float
    above_chance: bool | None
    """Whether the last score is more than 2 standard errors above chance; None where chance or items are not known."""


def of_scores(scores: ArrayLike, order: ArrayLike | None = None, chance: float | None = None, stderr: float | None = None) -> Stability:
    """From one score per checkpoint; `order` is the amount of training, by default their place."""
    values = np.asarray(scores, np.float64)
    steps = np.asarray(range(len(values)) if order is None else order, np.float64)
    values = values[np.argsort(steps, kind="stable")]
    steps = np.sort(steps)
    above = bool(values[-1] > chance + 2 * stderr) if chance is not None and stderr is not None else None
    return Stability(
        tau=_defined(kendall(steps, values)),
        interval=None,
        p=_defined(kendall_p(steps, values)),
        checkpoints=len(values),
        violations=int((np.diff(values) < 0).sum()),
        final=float(values[-1]),
        above_chance=above,
    )


def of_items(right: ArrayLike, order: ArrayLike | None = None, chance: float | None = None, seed: int = 0) -> Stability:
    """From right answers (checkpoints, items): also with the interval of tau when the same items are drawn again for all checkpoints."""
    table = np.asarray(right, np.float64)
    steps = np.asarray(range(len(table)) if order is None else order, np.float64)
    last = table[int(np.argmax(steps))]
    point = of_scores(table.mean(axis=1), steps, chance, error(float(last.mean()), binomial_error(int(last.sum()), len(last)), len(last)))
    low, high = bootstrap(lambda picks: kendall(steps, table[:, picks].mean(axis=1)), table.shape[1], seed)
    return Stability(**(vars(point) | {"interval": None if math.isnan(low) else (low, high)}))


@dataclass(frozen=True)
class Consistency:
    """Kendall's tau-b between base models and what was made of them; None where it is undefined."""

    tau: float | None
    p: float | None
    models: int


def consistency(base: Sequence[float], made: Sequence[float]) -> Consistency:
    """Whether models stand in the same order before and after the same treatment. Scores of both: the higher the better."""
    if len(base) != len(made):
        raise InputError(f"{len(base)} base scores and {len(made)} scores of the models made from them do not belong together.")
    return Consistency(_defined(kendall(base, made)), _defined(kendall_p(base, made)), len(base))


def stability(
    run: str | Path,
    tasks: Sequence[Any],
    *,
    store: bool = True,
    device: Any = None,
    dtype: str = "float32",
    progress: Callable[[str], object] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The stability of several ways to ask along the checkpoints of a run, and which of them to trust.

    `tasks` are mappings with `name` and options. One half of the items chooses: the way with the highest lower bound of tau among
    those whose last score is above chance; the figures that are returned for all come from the other half, so that the choice
    does not flatter itself. Raises `InputError` for fewer than three checkpoints.
    """
    checkpoints = [read.open(path) for path in read.list_checkpoints(run)]
    if len(checkpoints) < 3:
        raise InputError(f"{run} has {len(checkpoints)} checkpoints; the stability of a score along a run needs at least 3.")
    steps = [checkpoint.tokens or 0 for checkpoint in checkpoints]
    found, bounds = [], []
    for task in tasks:
        right, chance = _table(checkpoints, task, store, Compute(device, dtype), progress)
        order = np.argsort(uniform(seed_for(seed, "halves"), np.arange(right.shape[1])), kind="stable")
        choosing, reported = (of_items(right[:, half], steps, chance, seed) for half in (order[::2], order[1::2]))
        found.append({"task": task, "label": _label(task), "scores": right[:, order[1::2]].mean(axis=1).tolist(), "chance": chance, **vars(reported)})
        bounds.append(choosing.interval[0] if choosing.interval is not None and choosing.above_chance else -math.inf)
    best = int(np.argmax(bounds))
    return {"steps": steps, "tasks": found, "chosen": tasks[best] if bounds[best] > -math.inf else None}


def _table(
    checkpoints: Sequence[Checkpoint], task: Any, store: bool, compute: Compute, progress: Callable[[str], object] | None
) -> tuple[NDArray[np.bool_], float | None]:
    measurement = configure(Measurement, task)
    if not isinstance(measurement, ItemMeasurement):
        raise InputError("Stability with an interval needs single items; use choice, exact-answer or light-instruction.")
    seen = [observe(checkpoint, measurement, store=store, compute=compute, progress=progress) for checkpoint in checkpoints]
    chance = next((score.chance for score in measurement.scores(seen[0]) if score.metric == "accuracy"), None)
    return np.array([right_of(each) for each in seen]), chance


def _label(task: Any) -> str:
    """How a task is called in a table: its name and, of `choice`, the way of asking."""
    return task if isinstance(task, str) else "/".join(str(task[key]) for key in ("name", "ask", "normaliser") if key in task)


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value
