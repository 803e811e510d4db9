"""The stability gap of a continued model and three ways to make it smaller (card 20, proof b)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from cairn.catalog import Paper, register
from cairn.checkpoint.format.read import Checkpoint
from cairn.continual.plan import TokenBudget
from cairn.evaluation.audits.gap import Gap, at_the_fork, curve, stability_gap, task_gap
from cairn.studies import library
from cairn.studies.conditions import Condition, at_least, at_most, below, between, judged
from cairn.studies.continual import arms
from cairn.studies.continual.arms import BATCH, LOW
from cairn.studies.study import Figures, Say, Study

REFERENCE = library.docs("2 MiB")
STILL = {"rate": LOW, "warmup": "0 steps", "final": 1.0}
ARMS: dict[str, dict[str, Any]] = {
    "one pass": {},
    "subset": {"plan": TokenBudget(epochs=4)},
    "quality": {"plan": TokenBudget(epochs=4, quality=REFERENCE)},
    "mixture": {"plan": TokenBudget(epochs=4, quality=REFERENCE), "replay": 0.2},
}
CONTROLS: dict[str, dict[str, Any]] = {"old text alone": {}, "constant rate": STILL}
"""What re-warming does without a new domain, and a new domain without re-warming: the gap of the others is to be blamed on neither alone."""
MEASURED = [
    arms.HELD_OUT | {"sequences": 192},
    {"name": "next-token", "sequences": 192, "by_source": True},
    {"name": "known-names", "names": "speaker", "source": "plays"},
    {"name": "known-names", "names": "import", "source": "domain"},
]
SETTINGS = [f"data.sources.domain={json.dumps({'corpus': arms.SOURCE, 'weight': 0})}", f"callbacks.0.measurements={json.dumps(MEASURED)}"]
"""The domain is measured on a source of its own that is never read: what an arm chooses of it must not choose what it is measured on."""
TASKS = {
    "next-token/plays/accuracy": "next byte of plays",
    "known-names/speaker/accuracy": "speaker of plays, of 4",
    "next-token/domain/accuracy": "next byte of domain",
    "known-names/import/accuracy": "name after import, of 4",
}


@register("study", "stability-gap", paper=Paper("Efficient Continual Pre-training by Mitigating the Stability Gap", "arXiv:2406.14833", card=20))
class StabilityGap(Study):
    """A model that goes on with another domain loses general ability at first; keeping near the old mixture is what helps most."""

    minutes: ClassVar[float] = 7
    published: ClassVar[str] = (
        "OpenLlama-3B, continued on medical text with a subset for several epochs, chosen by quality, near the old mixture: average medical score 36.2 % to "
        "40.7 % at 40 % of the budget, without forgetting. The gap appears at all sizes and domains tried."
    )
    protocol: ClassVar[str] = (
        "The finished byte-level LLaMA of the study rewarm (2 layers, width 64, tiny-shakespeare) goes on for 200 steps of 1024 tokens on python-source, "
        "re-warmed to 3e-3: one pass; a subset for four epochs; the subset from the quarter of the text that a 5-gram model of python-docs finds likeliest "
        "(2 % clipped); the same with 20 % tiny-shakespeare. General loss: held-out tiny-shakespeare; domain loss: held-out python-source, the same for all "
        "arms; every 10 steps. Accuracies at the same steps, from before the first update on: the next byte of both held-out texts, and which of four real "
        "names of one length stands there: 400 speakers of the plays, and the names after import that the held-out source has (about 240 at this size; with "
        "the speakers more than the 400 of the card). Gap depth, time, recovery and area of each arm in each; not measurable where the base does no better "
        "than guessing (the commonest byte; one in four), within two standard errors. Beside the arms, without a condition of their own, so that neither is "
        "blamed for the other: the same re-warming on tiny-shakespeare alone, and python-source at the constant rate 3e-4. Conditions are the card's, in "
        "losses. Three seeds."
    )
    control: ClassVar[str] = "The new domain is the old one and the rate stays where it ended, in every arm: there is nothing to lose and nothing to mitigate."

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        base = arms.finished(seed, say)
        if sabotage:
            return _summary(dict.fromkeys(ARMS, _arm(base, "tiny-shakespeare", STILL, say)))
        found = {}
        for name, options in (ARMS | CONTROLS).items():
            say(f"seed {seed}: {name}")
            found[name] = _arm(base, "tiny-shakespeare" if name == "old text alone" else arms.SOURCE, options, say)
        return _summary(found)

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        def each(key: str) -> list[float]:
            return [run[key] for run in runs]

        cost, effect = "mixture: final domain loss minus that of one pass", "quality: domain loss minus that of the random subset"
        return [
            judged("one pass: depth of the gap in general loss", each("depth"), at_least(0.2), rule="mean", unit="nats", main=True),
            judged("mixture: share of the gap's area that is cut", each("mixture_cut"), at_least(0.4), rule="mean", main=True),
            judged(cost, each("mixture_cost"), between(-0.1, 0.1), rule="mean", unit="nats", main=True),
            judged("four epochs: area over that of one pass, minus 1", each("epochs_area"), at_most(0.05), rule="mean"),
            judged(effect, each("quality_effect"), below(0), rule="mean", unit="nats", main=True),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        titles = arms.losses(("plays", "domain")) | {task: f"accuracy, {what}" for task, what in TASKS.items()}
        arms.draw(runs, {name: name for name in (*ARMS, *CONTROLS)}, titles, path)


def _arm(base: Checkpoint, corpus: Any, options: Mapping[str, Any], say: Say) -> Figures:
    """Losses and accuracies of one arm over its steps, and the gap of each accuracy."""
    run = arms.continued(base, {"source": corpus}, options, say, SETTINGS)
    before = at_the_fork(run)
    curves = arms.curves(run, ("plays", "domain"), before=before) | {task: curve(run, task, before[task].value)[1] for task in TASKS}
    return {"curve": curves, "tasks": {task: task_gap(run, task, before) for task in TASKS}}


def _summary(found: dict[str, Figures]) -> Figures:
    curves = {name: each["curve"] for name, each in found.items()}
    gaps = {name: stability_gap(curve["steps"], curve["plays"]) for name, curve in curves.items()}
    domain = {name: curve["domain"][-1] for name, curve in curves.items()}
    area = gaps["one pass"].area
    return {
        "curves": curves,
        "gaps": {name: _plain(each) for name, each in gaps.items()},
        "task_gaps": {name: {task: _plain(each, BATCH) if each else "not measurable" for task, each in arm["tasks"].items()} for name, arm in found.items()},
        "depth": gaps["one pass"].depth,
        "mixture_cut": 1 - gaps["mixture"].area / area if area else 0.0,
        "mixture_cost": domain["mixture"] - domain["one pass"],
        "epochs_area": gaps["subset"].area / area - 1 if area else 0.0,
        "quality_effect": domain["quality"] - domain["subset"],
    }


def _plain(found: Gap, unit: int = 1) -> dict[str, float | None]:
    """Times in steps of `unit`; None: never recovered."""
    values = asdict(found) | {"at": found.at / unit, "recovery": found.recovery / unit}
    return {key: value if math.isfinite(value) else None for key, value in values.items()}
