"""A small source upsampled at the end of training: how much, for how long, late against spread, and what each source is worth (card 47)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cairn import plotting
from cairn.catalog import Paper, register
from cairn.checkpoint.format.read import Checkpoint, open
from cairn.selection.final_phase import ablate_sources, losses_by_source
from cairn.statistics import kendall
from cairn.studies import bases, library
from cairn.studies.conditions import Condition, above, at_least, at_most, below, judged, stated
from cairn.studies.continual import arms
from cairn.studies.continual.arms import BATCH
from cairn.studies.study import Figures, Say, Study
from cairn.training.run import Run

STEPS = 500
SHARES = (5, 10, 20, 40)
"""Lengths of the last phase in percent of the run."""
WEB = ("plays", "source", "docs")
BASE = {"plays": 0.32, "source": 0.33, "docs": 0.32, "maths": 0.03}
UP = {"plays": 0.2, "source": 0.2, "docs": 0.2, "maths": 0.4}
LATE = BASE["maths"] * 0.8 + UP["maths"] * 0.2
"""Share of the maths in the whole run whose last fifth is upsampled."""
SPREAD = {name: weight * (1 - LATE) / (1 - BASE["maths"]) for name, weight in BASE.items()} | {"maths": LATE}


@register(
    "study",
    "domain-upsampling",
    paper=Paper("Does your data spark joy? Performance gains from domain upsampling at the end of training", "arXiv:2406.03476", card=47),
)
class Upsampling(Study):
    """A small source, upsampled in the last fifth, is learned at little cost to the rest; leaving sources out there shows what each is worth."""

    minutes: ClassVar[float] = 6
    published: ClassVar[str] = (
        "7B on 1T tokens: up to +6.90 MMLU, +8.26 GSM8K, +6.17 HumanEval over the base mixture; 10 to 20 % of the run is best; removing a source from the last "
        "phase shows its effect at a tenth of the cost."
    )
    protocol: ClassVar[str] = (
        "A byte-level LLaMA (2 layers, width 64, context 64, batch 16; smaller than the card's) trains 500 steps on tiny-shakespeare, python-source, "
        "python-docs and 3 % GSM8K, warm-up, constant, linear decay over the last fifth (wsd). Forks of its checkpoints at 95, 90, 80 and 60 % raise GSM8K "
        "to 40 % (less than one pass) on the same schedule; one more run spreads the same GSM8K tokens evenly. From 80 % the phase is repeated without each "
        "source. Held-out loss of each source in nats per byte; web is the mean of the other three. Three seeds."
    )
    control: ClassVar[str] = "The last phase keeps the base mixture in every fork, which makes all of them the base run."

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        if seed not in _done:
            _done[seed] = _arms(seed, say)
        return _summary(_done[seed], sabotage)

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        def each(key: str) -> list[float]:
            return [run[key] for run in runs]

        own, noise = np.array(each("own_effects")), 2 * np.std(each("own_effects"), axis=0, ddof=1 if len(runs) > 1 else 0)
        worth = int(((own.mean(0) > noise) & np.array(each("own_is_largest")).all(0)).sum())
        same, gaps = each("same_rates"), each("token_gap")
        gain, late, cost = ([100 * value for value in each(key)] for key in ("maths_gain", "late_gain", "web_cost"))
        trends = "rank correlation of {} loss with the phase's length"
        return [
            stated("learning rates of the upsampled and the base run", "are equal", ", ".join(map(str, same)), all(same), always=True),
            stated("sequences of each source, late against spread", "within one batch", ", ".join(map(str, gaps)), all(gap <= 16 for gap in gaps), always=True),
            judged("GSM8K loss: how far upsampled lies below base", gain, at_least(3), unit="%", form=".1f", main=True),
            judged("web loss: how far upsampled lies above base", cost, below(2), unit="%", form=".1f"),
            judged("GSM8K loss: how far late lies below spread", late, above(0.5), unit="%", form=".1f", main=True),
            judged(trends.format("GSM8K"), each("maths_tau"), at_most(-0.66), main=True),
            judged(trends.format("web"), each("web_tau"), at_least(0.66), main=True),
            stated("sources whose own loss suffers most without them, by > 2 deviations over seeds", ">= 3 of 4", str(worth), worth >= 3, main=True),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        figure, axes = plotting.panels(2)
        for axis, source in zip(axes, ("maths", "web"), strict=True):
            for run in runs:
                axis.plot([0, *SHARES], [run["ends"][name][source] for name in ("base", *map(str, SHARES))], marker="o", label=f"seed {run['seed']}")
                axis.plot([20], [run["ends"]["spread"][source]], marker="x", color="grey")
            axis.set(xlabel="last phase, % of the run (x: spread)", title=f"held-out loss, {'GSM8K' if source == 'maths' else source}")
            axis.legend()
        plotting.save(figure, path)


_done: dict[int, Figures] = {}


def _recipe(seed: int, weights: dict[str, float]) -> dict[str, Any]:
    corpora = {"plays": "tiny-shakespeare", "source": arms.SOURCE, "docs": library.docs("4 MiB"), "maths": "gsm8k"}
    sources = {name: {"corpus": corpus, "weight": weights[name]} for name, corpus in corpora.items()}
    made = arms.recipe(seed, sources, STEPS, {"name": "wsd", "warmup": "20 steps", "decay": "20%"}, sequences=384, every=STEPS)
    made["checkpoint"] = {"every": f"{STEPS} steps", "also": [f"{STEPS - STEPS * share // 100} steps" for share in SHARES]}
    return made


def _at(run: Run, share: int) -> Checkpoint:
    return open(run.path / "checkpoints" / f"step-{STEPS - STEPS * share // 100:08d}")


def _arms(seed: int, say: Say) -> Figures:
    base = bases.run_of(_recipe(seed, BASE), say=say)
    ends = {"base": losses_by_source(base)}
    mixture = [f"data.sources.{name}.weight={weight}" for name, weight in UP.items()]
    late = {}
    for share in SHARES:
        say(f"seed {seed}: the last {share} % upsampled")
        late[share] = bases.forked(_at(base, share), mixture, say=say)
        ends[str(share)] = losses_by_source(late[share])
    say(f"seed {seed}: spread over the run")
    spread = bases.run_of(_recipe(seed, SPREAD), say=say)
    ends["spread"] = losses_by_source(spread)
    origin = _at(base, 20)
    value = ablate_sources(origin, UP, bases.folder_for("final-phase", origin.digest, UP), orders=1, sequences=384, say=say)
    counts = [run.newest().trainer["feed"]["cursor"] for run in (late[20], spread)]  # type: ignore[index]
    return {
        "ends": {name: end | {"web": float(np.mean([end[source] for source in WEB]))} for name, end in ends.items()},
        "effects": value.effects,
        "same_rates": [row["learning_rate"] for row in late[20].metrics()] == [row["learning_rate"] for row in base.metrics()[-STEPS // 5 :]],
        "token_gap": max(abs(counts[0][name] - counts[1][name]) for name in BASE),
        "tokens": {name: count * BATCH // 16 for name, count in counts[0].items()},
    }


def _summary(found: Figures, sabotage: bool) -> Figures:
    ends = dict(found["ends"])
    effects = found["effects"]
    if sabotage:
        ends |= {str(share): ends["base"] for share in SHARES}
        effects = {name: dict.fromkeys(row, 0.0) for name, row in effects.items()}
    up, base = ends["20"], ends["base"]
    own = {name: row[name] for name, row in effects.items()}
    return {
        **found,
        "ends": ends,
        "effects": effects,
        "maths_gain": 1 - up["maths"] / base["maths"],
        "web_cost": up["web"] / base["web"] - 1,
        "late_gain": 1 - up["maths"] / ends["spread"]["maths"],
        "maths_tau": _tau([ends[str(share)]["maths"] for share in SHARES]),
        "web_tau": _tau([ends[str(share)]["web"] for share in SHARES]),
        "own_effects": list(own.values()),
        "own_is_largest": [own[name] == max(row.values()) and own[name] > 0 for name, row in effects.items()],
    }


def _tau(values: Sequence[float]) -> float:
    """Kendall's tau with the length of the phase; 0 where nothing changes with it."""
    found = kendall(SHARES, values)
    return 0.0 if found != found else found
