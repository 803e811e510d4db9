"""Balancing the competition of weights against other merges, each with the same grids (card 66, proof b)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import torch

from cairn.catalog import Paper, register
from cairn.checkpoint.walk import Piece
from cairn.data import random
from cairn.evaluate.measure import Score
from cairn.merge.objective import Bench, Measure
from cairn.merge.pcb import Bounds, Pcb
from cairn.options import configure
from cairn.studies import bases
from cairn.studies.merge import facts
from cairn.studies.study import Criterion, Figures, Say, Study

SCALES = (0.3, 0.5, 1.0, 1.8)
SHARES = (0.1, 0.2, 0.5, 0.9)


class Shuffled(Pcb):
    """The same with the scores of each piece dealt out at random among its weights."""

    def _beta(self, piece: Piece, bounds: Bounds) -> torch.Tensor:
        beta = super()._beta(piece, bounds)
        order = random.permutation(random.seed_for(0, "shuffled", piece.name, piece.begin), piece.size, range(piece.size))
        return beta[:, torch.from_numpy(order)]


@register("study", "pcb", paper=Paper("Parameter Competition Balancing for Model Merging", "arXiv:2410.02396", card=66))
class Competition(Study):
    """A coefficient for every weight of every expert, without data, against one coefficient for all."""

    minutes: ClassVar[float] = 12
    published: ClassVar[str] = "About +4.3 points over the best earlier training-free merge for T5-base on 7 tasks and +3.5 for ViT-B/32 on 8."
    protocol: ClassVar[str] = (
        "The base and the six fact experts of the study tall-masks. Mean, task arithmetic, TIES, consensus and PCB (reference and pairwise) are "
        "tuned on half of the facts over the same scales (0.3, 0.5, 1.0, 1.8) and, where they sparsify, the same shares (0.1, 0.2, 0.5, 0.9); the other half "
        "is reported as mean accuracy over fields. Gate: tuned task arithmetic beats the base by 3 points. Three seeds; every condition in each. "
        "PCB means the reference variant; the pairwise variant and PCB with shuffled scores are tuned over the shares 0.5 and 0.9."
    )
    control: ClassVar[str] = "PCB keeps and weighs weights by scores that are shuffled among the weights."

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        if seed not in _done:
            _done[seed] = _figures(seed, say)
        figures = _done[seed]
        return figures | {"pcb": figures["shuffled"]} if sabotage else figures

    def check(self, runs: Sequence[Figures]) -> list[Criterion]:
        def line(name: str, required: str, found: Callable[[Figures], float], least: float) -> Criterion:
            return Criterion(name, required, ", ".join(f"{found(run):+.3f}" for run in runs), all(found(run) >= least for run in runs))

        def value(run: Figures, name: str) -> float:
            return run[name]["value"]

        return [
            line("gate: tuned task arithmetic minus base", ">= 0.03", lambda r: value(r, "task-arithmetic") - r["base"], 0.03),
            line("PCB minus TIES", ">= 0", lambda r: value(r, "pcb") - value(r, "ties"), 0.0),
            line("PCB minus task arithmetic", ">= 0.01", lambda r: value(r, "pcb") - value(r, "task-arithmetic"), 0.01),
            line("PCB minus PCB with shuffled scores", ">= 0.05", lambda r: value(r, "pcb") - value(r, "shuffled"), 0.05),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        names = ["mean", "task-arithmetic", "ties", "consensus", "pcb", "pcb_pairwise", "shuffled"]
        figure, axis = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
        for run in runs:
            axis.plot(names, [run[name]["value"] for name in names], marker="o", label=f"seed {run['seed']}")
            axis.axhline(run["base"], linewidth=0.6, linestyle=":")
        axis.set(title="mean accuracy over six fields (dotted: base)")
        axis.legend()
        figure.savefig(path, dpi=130)
        pyplot.close(figure)


_done: dict[int, Figures] = {}
"""Figures by seed: the control takes one of them away and measures nothing anew."""


def _figures(seed: int, say: Say) -> Figures:
    material = facts.prepare(seed, say)
    bench = Bench([material.base, *material.experts.values()])
    choose, report = (_mean(some) for some in (material.chosen_on, material.reported_on))

    def tuned(name: str, grid: Sequence[dict[str, Any]], make: Callable[[dict[str, Any]], Any] | None = None) -> Figures:
        say(f"seed {seed}: {len(grid)} of {name}")
        build = make or (lambda options: configure("operation", {"name": name, **options}))
        values = [bench.score(build(options), choose).value for options in grid]
        best = grid[values.index(max(values))]
        return {"options": best, "chosen": max(values), "value": bench.score(build(best), report).value, "grid": values}

    plain = [{"scale": scale} for scale in SCALES]
    sparse = [{"scale": s, "density": d, "scope": "model"} for d, s in product(SHARES, SCALES)]
    kept = [{"scale": s, "keep": k} for k, s in product(SHARES, SCALES)]
    return {
        "bases": bases.digests({"base": material.base, **material.experts}),
        "base": bench.alone(material.base, report).value,
        "mean": {"value": bench.score(configure("operation", {"name": "task-arithmetic", "scale": 1 / len(material.experts)}), report).value},
        "task-arithmetic": tuned("task-arithmetic", plain),
        "ties": tuned("ties", sparse),
        "consensus": tuned("consensus", [{"scale": s, "min_tasks": k} for k, s in product((1, 2), SCALES)]),
        "pcb": tuned("pcb", kept),
        "pcb_pairwise": tuned("pcb", [options | {"variant": "pairwise"} for options in kept[len(SCALES) * 2 :]]),
        "shuffled": tuned("shuffled pcb", kept[len(SCALES) * 2 :], lambda options: Shuffled(**options)),
    }


def _mean(some: dict[str, list[facts.Fact]]) -> Measure:
    return lambda model, tokenizer: Score("facts", "accuracy", facts.mean_accuracy(model, tokenizer, some), float("nan"), sum(map(len, some.values())))
