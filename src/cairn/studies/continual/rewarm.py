"""Re-warming a finished model on a new corpus: how high, how long, against scratch and replay (card 8, proof b)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from cairn.catalog import Paper, register
from cairn.evaluation.audits.gap import pareto, transition
from cairn.options import configure
from cairn.studies import bases
from cairn.studies.conditions import Condition, above, at_least, at_most, judged, stated
from cairn.studies.continual import arms
from cairn.studies.continual.arms import BATCH, LOW, MORE, PEAK
from cairn.studies.study import Figures, Say, Study
from cairn.training.run import Run

ARMS: dict[str, dict[str, Any]] = {
    "constant": {"rate": LOW, "warmup": "0 steps", "final": 1.0},
    "half": {"rate": PEAK / 2},
    "full": {},
    "double": {"rate": 2 * PEAK},
    "no warm-up": {"warmup": "0 steps"},
    "long warm-up": {"warmup": "10%"},
    "replay": {"replay": 0.25},
}
REWARMED = ("half", "full", "double", "no warm-up", "long warm-up")


@register("study", "rewarm", paper=Paper("Continual Pre-Training of Large Language Models: How to (re)warm your model?", "arXiv:2308.04014", card=8))
class RewarmStudy(Study):
    """Re-warming first costs and then pays: higher rates learn the new data better and forget more, the length of the rise does not matter."""

    minutes: ClassVar[float] = 7
    published: ClassVar[str] = (
        "Pythia-410M continued on SlimPajama: warm-up of 0 to 2 % makes no lasting difference; a higher maximal rate is better downstream and forgets more; "
        "re-warming raises both losses at first, also on the same data; continuing beats training from scratch."
    )
    protocol: ClassVar[str] = (
        "A byte-level LLaMA (2 layers, width 64, context 64, batch 16; smaller and shorter than the card's) trained 400 steps on tiny-shakespeare, "
        "rate 3e-3 to 3e-4, goes on for 200 steps on python-source with its moments: constant 3e-4; re-warmed to 0.5, 1 and 2 x 3e-3 (warm-up 1 %, "
        "cosine to a tenth); at 1x with warm-up 0 and 10 %; at 1x with 25 % replay; from scratch at 1x; at 1x on tiny-shakespeare itself. U and V are "
        "held-out losses of the old and the new source, every 10 steps. Means of three seeds; the exact condition must hold in each."
    )
    control: ClassVar[str] = "Re-warming is taken away: the arms that only differ in their rates keep the constant one, which makes them one run."

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        if seed not in _done:
            _done[seed] = _arms(seed, say)
        curves, error = _done[seed]
        if sabotage:
            curves = curves | {name: curves["constant"] for name in REWARMED}
        return _summary(curves, error)

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        def each(key: str) -> list[float]:
            return [run[key] for run in runs]

        errors, ends = each("rate_error"), [run["old_ends"] for run in runs]
        steps = [min(b - a for a, b in pairwise(end)) for end in ends]
        return [
            stated(
                "rates of every update against the closed form",
                "<= 1e-12",
                ", ".join(f"{error:.1e}" for error in errors),
                all(error <= 1e-12 for error in errors),
                always=True,
            ),
            judged("V(constant) - V(0.5x)", each("half_gain"), at_least(0.15), rule="mean", unit="nats", main=True),
            judged("V(0.5x) - V(1x)", each("full_gain"), at_least(0.05), rule="mean", unit="nats", main=True),
            judged(
                "smallest rise of U from the constant rate over 0.5x and 1x to 2x",
                steps,
                above(0),
                rule="mean",
                unit="nats",
                found="; ".join(str(end) for end in ends),
                main=True,
            ),
            judged("U(2x) - U(constant)", each("old_total"), at_least(0.1), rule="mean", unit="nats", main=True),
            judged("largest |dV| between warm-ups of 0, 1 and 10 %", each("warmup_effect"), at_most(0.05), rule="mean", unit="nats", main=True),
            judged("V(scratch) - V(1x)", each("over_scratch"), at_least(0.1), rule="mean", unit="nats", main=True),
            judged("U(1x) - U(1x with replay)", each("replay_saves"), at_least(0.3), rule="mean", unit="nats"),
            judged("V(1x with replay) - V(1x)", each("replay_costs"), at_most(0.15), rule="mean", unit="nats"),
            judged("U within 5 % of the run, minus U before, at 1x", each("first_rise"), above(0), unit="nats", main=True),
            judged("same data: largest rise of U", each("same_rise"), above(0), unit="nats", main=True),
            judged("same data: U at the end minus U before", each("same_end"), at_most(0), rule="mean", unit="nats"),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        shown = {"constant": "constant 3e-4", "half": "0.5 x", "full": "1 x", "double": "2 x", "replay": "1 x, 25 % replay"}
        arms.draw(runs, shown, arms.losses(("plays", "source")), path)


_done: dict[int, tuple[dict[str, Figures], float]] = {}
"""Curves by seed and the largest error of a rate: the control makes no run of its own."""


def _arms(seed: int, say: Say) -> tuple[dict[str, Figures], float]:
    base = arms.finished(seed, say)
    curves: dict[str, Figures] = {}
    errors = []
    for name, options in ARMS.items():
        say(f"seed {seed}: {name}")
        run = arms.continued(base, {"source": arms.SOURCE}, options, say)
        curves[name] = arms.curves(run, ("plays", "source"))
        errors.append(_rate_error(run, options))
    same = arms.continued(base, {"more": "tiny-shakespeare"}, {}, say)
    curves["same"] = arms.curves(same, ("plays",))
    sources = {"source": {"corpus": arms.SOURCE}, "plays": {"corpus": "tiny-shakespeare", "weight": 0}}
    scratch = bases.run_of(arms.recipe(seed, sources, MORE, {"name": "rewarm", "warmup": "1%", "final": 0.1}), say=say)
    curves["scratch"] = arms.curves(scratch, ("plays", "source"), forked=False)
    return curves, max(errors)


def _rate_error(run: Run, options: dict[str, Any]) -> float:
    """Largest difference of a run's rates from those of a schedule that begins at zero and has never heard of the base model."""
    words = {"name": "rewarm", "warmup": options.get("warmup", "1%"), "final": options.get("final", 0.1)}
    schedule = configure("schedule", words).pinned(BATCH, MORE * BATCH)
    rates = [row["learning_rate"] for row in run.metrics()]
    return max(abs(rate - options.get("rate", PEAK) * schedule.factor(step * BATCH, BATCH)) for step, rate in enumerate(rates))


def _summary(curves: dict[str, Figures], error: float) -> Figures:
    old, new = ({name: curve.get(source, [float("nan")])[-1] for name, curve in curves.items()} for source in ("plays", "source"))
    full, same = curves["full"]["plays"], curves["same"]["plays"]
    seen = [transition(name, curves[name]["steps"], curves[name]["plays"], curves[name]["source"]) for name in ARMS]
    return {
        "curves": curves,
        "rate_error": error,
        "half_gain": new["constant"] - new["half"],
        "full_gain": new["half"] - new["full"],
        "old_ends": [round(old[name], 3) for name in ("constant", "half", "full", "double")],
        "old_total": old["double"] - old["constant"],
        "warmup_effect": max(abs(new[a] - new[b]) for a in ("no warm-up", "full", "long warm-up") for b in ("no warm-up", "full", "long warm-up")),
        "over_scratch": new["scratch"] - new["full"],
        "replay_saves": old["full"] - old["replay"],
        "replay_costs": new["replay"] - new["full"],
        "first_rise": max(full[1 : 1 + MORE // 20 // 10]) - full[0],
        "same_rise": max(same) - same[0],
        "same_end": same[-1] - same[0],
        "transitions": [vars(each) for each in seen],
        "pareto": pareto(seen),
    }
