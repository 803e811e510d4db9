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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cairn.checkpoint.read import Checkpoint
from cairn.errors import InputError, suggestion
from cairn.merge.combine import merge

PROTOCOLS = ("last", "src-dev", "ca", "ca+ra")
ORACLE = "trg-dev"

Score = Callable[[Checkpoint, str], float]
"""What a checkpoint scores in a language (or domain); more is better."""


@dataclass(frozen=True)
class Choice:
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
) -> list[Choice]:
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
    table: list[Choice] = []
    averages: list[Checkpoint] = []
    for number, run in enumerate(runs):
        for name in protocols:
            if name == "ca+ra":
                continue
            chosen, scores = _chosen(name, run, score, source, targets, Path(work) / f"ca-{number}", last, options)
            if name == "ca":
                averages.append(chosen)
            table.append(Choice(name, number, chosen.path.name, scores, name == ORACLE))
    if "ca+ra" in protocols and len(runs) > 1:
        averages = averages or [_average(run, Path(work) / f"ca-{number}", last, options) for number, run in enumerate(runs)]
        both = merge("average", averages, Path(work) / "ca+ra", options)
        table.append(Choice("ca+ra", None, both.path.name, {target: score(both, target) for target in targets}))
    return table


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
        best = int(np.argmax(np.mean(list(every.values()), axis=0)))
        return run[best], {target: max(values) for target, values in every.items()}
    if protocol == "ca":
        chosen = _average(run, place, last, options)
    elif protocol == "src-dev":
        values = [score(checkpoint, source) for checkpoint in run]
        chosen = run[int(np.argmax(values))]
    else:
        chosen = run[-1]
    return chosen, {target: score(chosen, target) for target in targets}


def _average(run: Sequence[Checkpoint], place: Path, last: int | None, options: Mapping[str, Any] | None) -> Checkpoint:
    if last is not None and not 1 <= last <= len(run):
        raise InputError(f"A run has {len(run)} checkpoints here; the last {last} can not be averaged.")
    return merge("average", run[-last:] if last is not None else run, place, options)
