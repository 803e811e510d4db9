"""Claims against measurements: the claimed number is measured again by its own protocol, and the difference is judged by its standard error.

With d = measured - claimed and z = d / sqrt(se_measured^2 + se_claimed^2), a claim is confirmed while |z| <= 2, over-claimed where
the measurement is worse than that, under-claimed where it is better ("An Empirical Study of Pre-Trained Model Reuse", card 42, C).
A claim without a protocol, or without n or a standard error, is unverifiable, not false. On the same items the errors of both
numbers are alike and d varies less than z supposes: the audit is then too kind, never too strict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cairn import statistics
from cairn.checkpoint.format import read
from cairn.checkpoint.format.read import Checkpoint
from cairn.errors import CairnError
from cairn.registry import modelcard, statements
from cairn.registry.statements import Claim

Verdict = Literal["confirmed", "over-claimed", "under-claimed", "unverifiable"]

LIMIT = 2.0
LOWER_IS_BETTER = {"loss", "bits_per_byte", "perplexity", "wer", "cer", "error", "mse", "mae", "rmse", "word_perplexity"}
"""Metrics of which a smaller number is the bolder claim."""


@dataclass(frozen=True)
class Audit:
    """One claim and what became of it. `low` and `high` bound measured - claimed with 95 %."""

    claim: Claim
    verdict: Verdict
    measured: float | None = None
    stderr: float | None = None
    n: int | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    z: float | None = None
    reason: str = ""
    protocol: str | None = None


def z_score(measured: float, stderr: float, claimed: float, claimed_stderr: float) -> float:
    """(measured - claimed) in standard errors of the difference; 0 for equal numbers, infinite where different ones have no error."""
    difference, error = measured - claimed, math.hypot(stderr, claimed_stderr)
    if difference == 0:
        return 0.0
    return difference / error if error > 0 else math.copysign(math.inf, difference)


def judge(metric: str, z: float) -> Verdict:
    """What a z says of a claim on this metric."""
    if abs(z) <= LIMIT:
        return "confirmed"
    worse = z > 0 if metric.lower() in LOWER_IS_BETTER else z < 0
    return "over-claimed" if worse else "under-claimed"


def against(claim: Claim, measured: float, stderr: float | None, n: int | None = None, protocol: str | None = None) -> Audit:
    """Judge a claim by a measurement that is there already."""
    error = claim.error()
    own = statistics.error(measured, stderr, n)
    if error is None:
        return Audit(claim, "unverifiable", measured, stderr, n, reason="neither n nor a standard error is given", protocol=protocol)
    if not math.isfinite(own):
        return Audit(claim, "unverifiable", measured, None, n, reason="the measurement has no standard error", protocol=protocol)
    z = z_score(measured, own, claim.value, error)
    ends = statistics.interval(claim.value, error, claim.n), statistics.interval(measured, stderr, n)
    low, high = statistics.difference(claim.value, ends[0], measured, ends[1])
    return Audit(claim, judge(claim.metric, z), measured, stderr, n, measured - claim.value, low, high, z, protocol=protocol)


def audit(source: str | Path | Checkpoint, *, progress: Callable[[str], object] | None = None) -> list[Audit]:
    """Measure every claim on a checkpoint again, those of its model card included; what was measured before costs nothing."""
    checkpoint = source if isinstance(source, Checkpoint) else read.open(source)
    claims = [*modelcard.claims_in(checkpoint.path / "README.md"), *statements.load(checkpoint).claims]
    return [_audit(checkpoint, claim, progress) for claim in claims]


def _audit(checkpoint: Checkpoint, claim: Claim, progress: Callable[[str], object] | None) -> Audit:
    from cairn.evaluation.measure import evaluate

    if claim.task is None:
        return Audit(claim, "unverifiable", reason="no protocol is given")
    try:
        rows = evaluate(checkpoint, [claim.task], progress=progress)
    except CairnError as error:
        # A protocol that cannot be followed here says nothing of the claim.
        return Audit(claim, "unverifiable", reason=str(error))
    fitting = [row for row in rows if row.metric == claim.metric and (claim.dataset in (None, row.task) or len({r.task for r in rows}) == 1)]
    if len(fitting) != 1:
        there = ", ".join(sorted({f"{row.task}: {row.metric}" for row in rows}))
        return Audit(claim, "unverifiable", reason=f"the protocol measures {there}, which is not one number called '{claim.metric}'")
    (row,) = fitting
    return against(claim, row.value, row.stderr, row.n, row.protocol)


def against_results(claims: Sequence[Claim], results: Sequence[dict[str, Any]]) -> list[Audit]:
    """Judge claims by results that are there already (rows of the index); nothing is measured."""
    found = []
    for claim in claims:
        fitting = [r for r in results if claim.task is not None and r["metric"] == claim.metric and _same_protocol(claim.task, r["protocol"])]
        if claim.dataset is not None and len(fitting) > 1:
            fitting = [r for r in fitting if r["task"] == claim.dataset]
        if claim.task is None:
            found.append(Audit(claim, "unverifiable", reason="no protocol is given"))
        elif len(fitting) != 1:
            found.append(Audit(claim, "unverifiable", reason="not measured yet: cairn audit claims"))
        else:
            found.append(against(claim, fitting[0]["value"], fitting[0]["stderr"], fitting[0]["n"]))
    return found


def _same_protocol(task: dict[str, Any], protocol: str) -> bool:
    """Whether a stored protocol is that of a task: all that the task says stands in it."""
    import json

    stored = json.loads(protocol) or {}
    return isinstance(stored, dict) and all(stored.get(key) == value for key, value in task.items())
