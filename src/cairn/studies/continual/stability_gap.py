"""The stability gap of a continued model and three ways to make it smaller (card 20, proof b)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cairn.catalog import Paper, register
from cairn.continual.plan import Plan
from cairn.evaluate.gap import gap
from cairn.studies.continual import arms
from cairn.studies.continual.arms import LOW, at_least
from cairn.studies.study import Criterion, Figures, Say, Study

REFERENCE = {"name": "python-docs", "max_bytes": "2 MiB"}
ARMS: dict[str, dict[str, Any]] = {
    "one pass": {},
    "subset": {"plan": Plan(epochs=4)},
    "quality": {"plan": Plan(epochs=4, quality=REFERENCE)},
    "mixture": {"plan": Plan(epochs=4, quality=REFERENCE), "replay": 0.2},
}


@register("study", "stability-gap", paper=Paper("Efficient Continual Pre-training by Mitigating the Stability Gap", "arXiv:2406.14833", card=20))
class StabilityGap(Study):
    """A model that goes on with another domain loses general ability at first; keeping near the old mixture is what helps most."""

    minutes: ClassVar[float] = 5
    published: ClassVar[str] = (
        "OpenLlama-3B, continued on medical text with a subset for several epochs, chosen by quality, near the old mixture: average medical score 36.2 % to "
        "40.7 % at 40 % of the budget, without forgetting. The gap appears at all sizes and domains tried."
    )
    protocol: ClassVar[str] = (
        "The finished byte-level LLaMA of the study rewarm (2 layers, width 64, tiny-shakespeare) goes on for 200 steps of 1024 tokens on python-source, "
        "re-warmed to 3e-3: one pass; a subset for four epochs; the subset from the quarter of the text that a 5-gram model of python-docs finds likeliest "
        "(2 % clipped); the same with 20 % tiny-shakespeare. General loss: held-out tiny-shakespeare; domain loss: held-out python-source, every 10 steps. "
        "Losses alone: the card's accuracies are left out. Three seeds."
    )
    control: ClassVar[str] = "The new domain is the old one and the rate stays where it ended, in every arm: there is nothing to lose and nothing to mitigate."

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        base = arms.finished(seed, say)
        if sabotage:
            run = arms.continued(base, {"source": "tiny-shakespeare"}, {"rate": LOW, "warmup": "0 steps", "final": 1.0}, say)
            same = arms.curves(run, ("plays", "source"))
            return _summary(dict.fromkeys(ARMS, same))
        curves = {}
        for name, options in ARMS.items():
            say(f"seed {seed}: {name}")
            run = arms.continued(base, {"source": arms.SOURCE}, options, say)
            curves[name] = arms.curves(run, ("plays", "source"))
        return _summary(curves)

    def check(self, runs: Sequence[Figures]) -> list[Criterion]:
        effects = [run["quality_effect"] for run in runs]
        error = float(np.std(effects, ddof=1)) / math.sqrt(len(effects)) if len(effects) > 1 else math.inf
        better = bool(-np.mean(effects) > 2 * error)
        return [
            at_least("one pass: depth of the gap in general loss", 0.2, runs, "depth"),
            at_least("mixture: share of the gap's area that is cut", 0.4, runs, "mixture_cut"),
            Criterion("mixture: final domain loss against one pass", "within 0.1 (mean)", arms.each(runs, "mixture_cost"), _near(runs)),
            Criterion("four epochs: area against one pass", "<= +5 % (mean)", arms.each(runs, "epochs_area"), arms.mean(runs, "epochs_area") <= 0.05),
            Criterion(
                "quality: domain loss against the random subset",
                "better by > 2 standard errors",
                arms.each(runs, "quality_effect"),
                better,
            ),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        arms.draw(runs, {name: name for name in ARMS}, ("plays", "source"), path)


def _near(runs: Sequence[Figures]) -> bool:
    return abs(arms.mean(runs, "mixture_cost")) <= 0.1


def _summary(curves: dict[str, Figures]) -> Figures:
    gaps = {name: gap(curve["steps"], curve["plays"]) for name, curve in curves.items()}
    domain = {name: curve["source"][-1] for name, curve in curves.items()}
    area = gaps["one pass"].area
    return {
        "curves": curves,
        "gaps": {name: {key: value if math.isfinite(value) else None for key, value in asdict(each).items()} for name, each in gaps.items()},
        "depth": gaps["one pass"].depth,
        "mixture_cut": 1 - gaps["mixture"].area / area if area else 0.0,
        "mixture_cost": domain["mixture"] - domain["one pass"],
        "epochs_area": gaps["subset"].area / area - 1 if area else 0.0,
        "quality_effect": domain["quality"] - domain["subset"],
    }
