"""Three corpora in sequence: one constant rate with annealed branches against a cosine for each corpus (card 87, proof b)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cairn.catalog import Paper, register
from cairn.checkpoint.format.read import open
from cairn.checkpoint.format.verify import verify
from cairn.continual.pretrain import settings_to_anneal
from cairn.options import configure
from cairn.studies import bases, library
from cairn.studies.conditions import Condition, above, at_least, judged, stated
from cairn.studies.continual import arms
from cairn.studies.continual.arms import BATCH
from cairn.studies.study import Figures, Say, Study
from cairn.training.run import Run

EACH, LEAF = 200, 60
"""Steps of each corpus, and of the last ones that are annealed."""
SOURCES = ("plays", "source", "docs")
WARM, FINAL = 10, 0.1


@register(
    "study",
    "infinite-schedule",
    paper=Paper("Beyond Cosine Decay: On the effectiveness of Infinite Learning Rate Schedule for Continual Pre-training", "arXiv:2503.02844", card=87),
)
class InfiniteSchedule(Study):
    """One constant rate over all corpora, annealed in a branch, forgets less than a cosine for each and is better over all."""

    minutes: ClassVar[float] = 6
    published: ClassVar[str] = (
        "The infinite schedule consistently beats repeated cosine decay in continual pre-training, without a fixed budget (figures not given here)."
    )
    protocol: ClassVar[str] = (
        "A byte-level LLaMA (2 layers, width 64, context 64, batch 16; smaller than the card's) reads tiny-shakespeare, python-source and python-docs, "
        "200 steps each, moments kept. Repeated cosine: 3e-3 to 3e-4 for each corpus, warm-up 10 steps. Infinite: warm-up 10, cooldown to step 100 down to "
        "0.5 or 0.25 of 3e-3, constant, the last 60 of the 600 steps annealed to 3e-4 in a branch. All have 600 steps in all. Held-out loss of each source "
        "every 10 steps. Replay is not tried. Three seeds."
    )
    control: ClassVar[str] = "Both infinite arms are given the schedule of repeated cosine, which makes them that run; so is the prefix that is compared."

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        if seed not in _done:
            _done[seed] = _methods(seed, say)
        return _summary(_done[seed], sabotage)

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        def each(key: str) -> list[float]:
            return [run[key] for run in runs]

        def same(name: str, required: str, key: str) -> Condition:
            return stated(name, required, ", ".join(str(run[key]) for run in runs), all(run[key] for run in runs), always=True)

        return [
            same("the first 200 rates of runs of 1, 3 and 30 corpora", "are equal", "prefix"),
            same("the trunk after the branch was cut", "byte-identical", "trunk_same"),
            same("its next loss, branch and trunk", "bit-equal", "next_same"),
            judged("mean final loss, repeated cosine minus the better infinite", each("gain"), at_least(0.03), rule=2, unit="nats", main=True),
            judged("rise of old losses in the first 10 % after a switch: share saved", each("spike_saved"), at_least(0.1), rule="mean", main=True),
            judged("annealing: loss on the newest corpus, before minus after", each("anneal_drop"), at_least(0.05), rule="mean", unit="nats"),
            judged("newest corpus: trunk minus repeated cosine, same steps", each("unannealed"), above(0), rule="mean", unit="nats"),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        arms.draw(runs, {"cosine": "repeated cosine", "0.5": "infinite, 0.5", "0.25": "infinite, 0.25"}, arms.losses(SOURCES), path)


_done: dict[int, Figures] = {}


def _recipe(seed: int, schedule: dict[str, Any], steps: int) -> dict[str, Any]:
    corpora = {"plays": "tiny-shakespeare", "source": arms.SOURCE, "docs": library.docs("1 MiB")}
    made = arms.recipe(seed, {name: {"corpus": corpus} for name, corpus in corpora.items()}, steps, schedule, sequences=192)
    made["data"]["mixture"] = [{"at": f"{i * EACH} steps", "weights": {name: float(name == now) for name in SOURCES}} for i, now in enumerate(SOURCES)]
    made["checkpoint"] = {"every": f"{EACH} steps", "also": [f"{3 * EACH - LEAF} steps"]}
    return made


def _infinite(constant: float) -> dict[str, Any]:
    return {"name": "infinite", "warmup": f"{WARM} steps", "cooldown": f"{EACH // 2} steps", "constant": constant}


def _cosine(begin: int = 0) -> dict[str, Any]:
    return {"name": "rewarm", "warmup": f"{WARM} steps", "horizon": f"{EACH} steps", "final": FINAL, "start": f"{begin} steps"}


def _methods(seed: int, say: Say) -> Figures:
    """Curves of the three methods and of both trunks without a branch, and what the exact conditions need."""
    found: Figures = {"curves": {}}
    say(f"seed {seed}: repeated cosine")
    parts = [bases.run_of(_recipe(seed, _cosine(), EACH), say=say)]
    for i in (1, 2):
        settings = [f"schedule.start={i * EACH * BATCH} tokens", f"training.tokens={(i + 1) * EACH} steps"]
        parts.append(bases.forked(parts[-1].newest(), settings, say=say))
    found["curves"]["cosine"] = _joined(parts)
    for constant in (0.5, 0.25):
        say(f"seed {seed}: infinite, {constant}")
        trunk = bases.run_of(_recipe(seed, _infinite(constant), 3 * EACH), say=say)
        origin = trunk.path / "checkpoints" / f"step-{3 * EACH - LEAF:08d}"
        leaf = bases.forked(origin, settings_to_anneal(origin, f"{LEAF} steps", final=FINAL), say=say)
        found["curves"][f"{constant} trunk"] = _joined([trunk])
        found["curves"][f"{constant}"] = _joined([trunk, leaf])
        found[f"{constant}"] = {"trunk_same": _untouched(origin, leaf), "next_same": _loss(leaf, 0) == _loss(trunk, 3 * EACH - LEAF)}
    return found


def _untouched(origin: Path, leaf: Run) -> bool:
    """Whether every byte of the trunk's checkpoint is what it was when the leaf was cut: its lineage names the digest of then."""
    then = open(leaf.checkpoints()[0]).lineage
    return verify(origin).sound and then is not None and then.parents[0].digest == open(origin).digest


def _loss(run: Run, row: int) -> float:
    return float(run.metrics()[row]["loss"])


def _joined(parts: Sequence[Run]) -> Figures:
    """One curve over the parts of a sequence of runs; a later part replaces what an earlier one has after its beginning."""
    values: dict[int, dict[str, float]] = {}
    for part in parts:
        rows = part.metrics()
        values = {step: row for step, row in values.items() if step < rows[0]["step"]}
        values |= {row["step"]: {s: row[f"held-out/{s}/loss"] for s in SOURCES} for row in rows if f"held-out/{SOURCES[0]}/loss" in row}
    steps = sorted(values)
    return {"steps": steps, **{source: [values[step][source] for step in steps] for source in SOURCES}}


def _summary(found: Figures, sabotage: bool) -> Figures:
    curves = dict(found["curves"])
    if sabotage:
        curves |= {name: curves["cosine"] for name in ("0.5", "0.25", "0.5 trunk", "0.25 trunk")}
    ends = {name: float(np.mean([curve[source][-1] for source in SOURCES])) for name, curve in curves.items()}
    better = min(("0.5", "0.25"), key=lambda name: ends[name])
    spikes = {name: _spike(curve) for name, curve in curves.items()}
    newest = {name: curve[SOURCES[-1]][-1] for name, curve in curves.items()}
    return {
        "curves": curves,
        "prefix": _prefix_kept(_cosine_of_length if sabotage else _infinite_of_length),
        "cosine_prefix": _prefix_kept(_cosine_of_length),
        "trunk_same": all(found[name]["trunk_same"] for name in ("0.5", "0.25")),
        "next_same": all(found[name]["next_same"] for name in ("0.5", "0.25")),
        "ends": ends,
        "better": better,
        "gain": ends["cosine"] - ends[better],
        "spikes": spikes,
        "spike_saved": 1 - spikes[better] / spikes["cosine"] if spikes["cosine"] else 0.0,
        "anneal_drop": newest[f"{better} trunk"] - newest[better],
        "unannealed": newest[f"{better} trunk"] - newest["cosine"],
    }


def _spike(curve: Figures) -> float:
    """Mean over both switches and the sources known by then: the largest loss in the first tenth after it, minus the loss at it."""
    rises = []
    for switch in (1, 2):
        at = curve["steps"].index(switch * EACH)
        until = curve["steps"].index(switch * EACH + EACH // 10)
        rises += [max(curve[source][at : until + 1]) - curve[source][at] for source in SOURCES[:switch]]
    return float(np.mean(rises))


def _infinite_of_length(corpora: int) -> list[float]:
    schedule = configure("schedule", _infinite(0.5)).pinned(BATCH, corpora * EACH * BATCH)
    return [schedule.factor(step * BATCH, BATCH) for step in range(EACH)]


def _cosine_of_length(corpora: int) -> list[float]:
    schedule = configure("schedule", {"name": "rewarm", "warmup": f"{WARM} steps", "final": FINAL}).pinned(BATCH, corpora * EACH * BATCH)
    return [schedule.factor(step * BATCH, BATCH) for step in range(EACH)]


def _prefix_kept(of_length: Any) -> bool:
    """Whether the first rates of a run do not depend on how many corpora will follow."""
    first, *others = (of_length(corpora) for corpora in (1, 3, 30))
    return all(other == first for other in others)
