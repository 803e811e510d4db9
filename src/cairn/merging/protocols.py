"""Which checkpoint is reported: selection protocols over runs, side by side, the one that looks at the target marked as an oracle.

    last       the last checkpoint of each run
    src-dev    the checkpoint of each run that is best on source validation
    ca         the average of a run's last k checkpoints
    ca+ra      the average of the runs' averages (one line; heads must be shared)
    trg-dev    the checkpoint of each run that is best on the target: an oracle, refused unless it is asked for by name

A protocol never sees target scores before it has chosen; only the oracle does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cairn.checkpoint.format import read
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating.stream import apply
from cairn.device import computes
from cairn.errors import InputError, suggestion
from cairn.evaluation.measure import evaluate
from cairn.merging.target import LOWER
from cairn.options import configure
from cairn.statistics import first_largest

PROTOCOLS = ("last", "src-dev", "ca", "ca+ra")
ORACLE = "trg-dev"

Score = Callable[[Checkpoint, str], float]
"""What a checkpoint scores in a language (or domain); more is better."""


@dataclass(frozen=True)
class ProtocolChoice:
    """What a protocol chose for a run (`run` is None for an average over runs) and what that scores in each target."""

    protocol: str
    run: int | None
    checkpoint: str
    scores: dict[str, float]
    oracle: bool = False

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.scores.values())))


def evaluate_selection(
    runs: Sequence[Sequence[Checkpoint]],
    score: Score,
    source: str,
    targets: Sequence[str],
    work: str | Path,
    *,
    protocols: Sequence[str] = PROTOCOLS,
    oracle: bool = False,
    last: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[ProtocolChoice]:
    """The table of protocols for runs, each a sequence of checkpoints, oldest first; averages are written under `work`.

    `last` is how many checkpoints of a run are averaged (default: all), `options` are those of the average (`heads`).
    Raises `InputError` for the oracle unless `oracle=True`: choosing on the target is no transfer.
    """
    for name in protocols:
        if name == ORACLE and not oracle:
            raise InputError(f"'{ORACLE}' chooses by the data that it reports; ask for that with oracle=True, and it will be marked.")
        if name not in (*PROTOCOLS, ORACLE):
            raise InputError(f"There is no protocol '{name}'.{suggestion(name, (*PROTOCOLS, ORACLE))}")
    if source in targets:
        raise InputError(f"'{source}' is source and target; what chooses must not be what is reported.")
    table: list[ProtocolChoice] = []
    averages: list[Checkpoint] = []
    for number, run in enumerate(runs):
        for name in protocols:
            if name == "ca+ra":
                continue
            chosen, scores = _chosen(name, run, score, source, targets, Path(work) / f"ca-{number}", last, options)
            if name == "ca":
                averages.append(chosen)
            table.append(ProtocolChoice(name, number, chosen.path.name, scores, name == ORACLE))
    if "ca+ra" in protocols and len(runs) > 1:
        averages = averages or [_average(run, Path(work) / f"ca-{number}", last, options) for number, run in enumerate(runs)]
        both = _mean(averages, Path(work) / "ca+ra", options)
        table.append(ProtocolChoice("ca+ra", None, both.path.name, {target: score(both, target) for target in targets}))
    return table


@computes
def measured_selection(
    runs: Sequence[str | Path],
    task: str,
    source: Mapping[str, Any],
    targets: Mapping[str, Mapping[str, Any]],
    work: str | Path,
    *,
    metric: str | None = None,
    oracle: bool = False,
    last: int | None = None,
    heads: str = "averaged",
    device: Any = None,
) -> list[ProtocolChoice]:
    """The same table where a score is a measurement: `task` with the options of the source, and with those of each target.

    Scores are kept beside the checkpoints like all measurements; less is better where the metric is a loss. Raises `InputError`
    for runs without checkpoints and for a target that is measured on the source's data.
    """
    found = {str(run): [read.open(path) for path in read.list_checkpoints(run)] for run in runs}
    for name, checkpoints in found.items():
        if not checkpoints:
            raise InputError(f"The run {name} has no complete checkpoint to choose.")
    if not targets:
        raise InputError("There is nothing to report on; name targets by their options, for example target.de.corpus=de.txt.")
    name = metric or ("loss" if task == "held-out" else "accuracy")
    where = {"source": dict(source), **{target: dict(options) for target, options in targets.items()}}
    if "source" in targets or any(options == where["source"] for options in list(where.values())[1:]):
        raise InputError("A target is measured on the data of the source; what chooses must not be what is reported.")

    def score(checkpoint: Checkpoint, language: str) -> float:
        scores = {row.metric: row.value for row in evaluate(checkpoint, [{"name": task, **where[language]}])}
        if name not in scores:
            raise InputError(f"{task} has no metric '{name}'.{suggestion(name, scores)}")
        return -scores[name] if name in LOWER else scores[name]

    protocols = (*PROTOCOLS, ORACLE) if oracle else PROTOCOLS
    Path(work).mkdir(parents=True)
    table = evaluate_selection(
        list(found.values()), score, "source", list(targets), work, protocols=protocols, oracle=oracle, last=last, options={"heads": heads}
    )
    sign = -1 if name in LOWER else 1
    return [replace(choice, scores={target: sign * value for target, value in choice.scores.items()}) for choice in table]


def _chosen(
    protocol: str,
    run: Sequence[Checkpoint],
    score: Score,
    source: str,
    targets: Sequence[str],
    place: Path,
    last: int | None,
    options: Mapping[str, Any] | None,
) -> tuple[Checkpoint, dict[str, float]]:
    if protocol == ORACLE:
        # The best checkpoint of each target by itself: an upper bound that no one could have picked.
        every = {target: [score(checkpoint, target) for checkpoint in run] for target in targets}
        best = _best(np.mean(list(every.values()), axis=0), run, "the targets")
        return run[best], {target: max(values) for target, values in every.items()}
    if protocol == "ca":
        chosen = _average(run, place, last, options)
    elif protocol == "src-dev":
        values = [score(checkpoint, source) for checkpoint in run]
        chosen = run[_best(values, run, "the source")]
    else:
        chosen = run[-1]
    return chosen, {target: score(chosen, target) for target in targets}


def _best(values: ArrayLike, run: Sequence[Checkpoint], where: str) -> int:
    """The number of the best score. Raises `InputError` where one is no number: nobody knows what it would have been."""
    best = first_largest(values)
    if best is None:
        wrong = next((item for item, value in zip(run, np.asarray(values), strict=True) if not np.isfinite(value)), run[0])
        raise InputError(f"{wrong.path} has no finite score on {where}, so the best checkpoint of its run cannot be chosen; leave it out or check its weights.")
    return best


def _average(run: Sequence[Checkpoint], place: Path, last: int | None, options: Mapping[str, Any] | None) -> Checkpoint:
    if last is not None and not 1 <= last <= len(run):
        raise InputError(f"A run has {len(run)} checkpoints here; the last {last} cannot be averaged.")
    return _mean(run[-last:] if last is not None else run, place, options)


def _mean(checkpoints: Sequence[Checkpoint], place: Path, options: Mapping[str, Any] | None) -> Checkpoint:
    return apply(configure("operation", {"name": "average", **(options or {})}), list(checkpoints), place)
