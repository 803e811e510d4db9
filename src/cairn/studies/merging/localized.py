"""Masks that bring experts back out of their sum, and merges of what several experts need (card 26, proofs b and c)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from cairn import plotting, randomness
from cairn.catalog import Paper, register
from cairn.checkpoint.operating.walk import TensorSlice
from cairn.errors import InputError
from cairn.evaluation.measure import Score
from cairn.merging.arithmetic import task_vectors
from cairn.merging.coefficients import at
from cairn.merging.methods import tall_masks
from cairn.merging.methods.consensus import Consensus
from cairn.merging.methods.task_arithmetic import added
from cairn.merging.target import Bench, Measure
from cairn.options import configure
from cairn.statistics import first_largest
from cairn.studies import bases
from cairn.studies.conditions import Bound, Condition, at_least, at_most, below, judged, stated
from cairn.studies.merging import digits, facts, plain_masks
from cairn.studies.merging.facts import FactExperts, FactPair
from cairn.studies.study import Figures, Say, Study

if TYPE_CHECKING:
    from torch import nn

SCALES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)


def measure_of(some: dict[str, list[FactPair]], normal: dict[str, float]) -> Measure:
    """Mean over fields of accuracy divided by the expert's own."""

    def measure(model: nn.Module, tokenizer: Any) -> Score:
        shares = [facts.accuracy(model, tokenizer, some[field]) / normal[field] for field in some]
        return Score("facts", "normalised accuracy", float(np.mean(shares)), float("nan"), sum(map(len, some.values())))

    return measure


def of_field(some: Sequence[FactPair]) -> Measure:
    """Accuracy on one field."""
    return lambda model, tokenizer: Score("facts", "accuracy", facts.accuracy(model, tokenizer, some), float("nan"), len(some))


def tuned(bench: Bench, choose: Measure, report: Measure, method: str, grid: Sequence[dict[str, Any]]) -> Figures:
    """The options of a grid that are best by `choose`, and what `report` says of them."""
    number = first_largest([bench.score(configure("operation", {"name": method, **options}), choose).value for options in grid])
    if number is None:
        raise InputError(f"A merge by {method} measures as no finite number, so no options of the grid can be chosen.")
    best = grid[number]
    return {"options": best, "value": bench.score(configure("operation", {"name": method, **best}), report).value}


class ByChance(Consensus):
    """Keeps as many weights as consensus does, chosen at random."""

    share: float

    def blend(self, piece: TensorSlice, known: object) -> torch.Tensor:
        places = np.arange(piece.begin, piece.begin + piece.size)
        kept = torch.from_numpy(randomness.uniform(randomness.seed_for(0, "by chance", piece.name), places) < self.share)
        return added(piece.inputs[0], task_vectors(piece.inputs).sum(0) * kept, at(self.scale, piece.name))


@register("study", "tall-masks", paper=Paper("Localizing Task Information for Improved Model Merging and Compression", "arXiv:2405.07813", card=26))
class Localized(Study):
    """One bit per weight brings an expert back out of the sum of all; weights that no or one expert needs disturb a merge."""

    minutes: ClassVar[float] = 7
    published: ClassVar[str] = (
        "Masks on the multi-task vector keep more than 99 % of single-task accuracy up to 20 tasks (57 GB to 8.2 GB); "
        "consensus improves task arithmetic and TIES."
    )
    protocol: ClassVar[str] = (
        "A decoder (3 layers, width 128, BPE 2048) learns 500 CounterFact records in three phrasings (360 steps of 2048 tokens, AdamW 3e-3, cosine). "
        "Six experts each learn 120 new facts of one field (60 steps of 512 tokens, AdamW 5e-4). Half of the facts choose thresholds (0.2 to 0.6), "
        "scales (0.2 to 0.8) and the number of tasks; the other half is reported, divided by the expert's own accuracy. TALL masks are built and taken "
        "back from a bundle on disk, beside a random and a magnitude mask of the same density. Gate for merging: tuned task arithmetic beats the base "
        "by 3 points. Digits: a network 64-256-128-64, pretrained on scikit-learn's digits (600 steps of 64, AdamW 1e-3), is tuned to "
        "eight transforms (rotate, mirror, upside-down, invert, roll, transpose, permute, occlude; 150 AdamW steps each, 5e-4, no weight decay) under frozen "
        "linear-probe heads; 997 digits train, 400 choose thresholds, 400 are reported. How many tasks need each weight is recorded "
        "without a condition, and merges are not measured there: the card's pilot found all of them within a point of the base. "
        "Three seeds; every condition in each."
    )
    control: ClassVar[str] = (
        "Each expert, of facts and of digits, is taken out of the sum with a random mask of its own mask's density, and consensus keeps weights by chance."
    )

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        if seed not in _done:
            _done[seed] = _figures(seed, work / "facts", say) | {"digits": digits.figures(seed, work / "digits", say)}
        figures = _done[seed]
        if not sabotage:
            return figures
        merging = figures["merging"] | {"consensus": figures["merging"]["by_chance"]}
        transforms = figures["digits"] | {"tall": figures["digits"]["random"]}
        return figures | {"tall": figures["random"], "merging": merging, "digits": transforms}

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        def line(name: str, bound: Bound, found: Callable[[Figures], float], main: bool = False) -> Condition:
            return judged(name, [*map(found, runs)], bound, main=main)

        def gain(run: Figures) -> float:
            return float(run["merging"]["consensus"]["value"] - run["merging"]["task-arithmetic"]["value"])

        def gate(run: Figures) -> float:
            return float(run["merging"]["task-arithmetic"]["value"] - run["merging"]["base"])

        sizes = [run["bytes_over_formula"] for run in runs]
        return [
            line("TALL reconstruction, share of single-expert accuracy", at_least(0.95), lambda r: r["tall"], main=True),
            line("random mask of the same density", at_most(0.55), lambda r: r["random"]),
            line("magnitude mask of the same density", at_most(0.9), lambda r: r["magnitude"]),
            line("digits: TALL reconstruction, share of single-task accuracy", at_least(0.95), lambda r: r["digits"]["tall"], main=True),
            line("digits: random mask of the same density", below(0.85), lambda r: r["digits"]["random"]),
            line("digits: magnitude mask of the same density", below(0.85), lambda r: r["digits"]["magnitude"]),
            line("digits: unmasked sum at scale 1", below(0.5), lambda r: r["digits"]["sum"]),
            line("gate: tuned task arithmetic minus base", at_least(0.03), gate, main=True),
            line("consensus (tasks chosen by validation) minus task arithmetic", at_least(0.01), gain, main=True),
            stated(
                "bytes of the bundle over the formula",
                "1",
                ", ".join(f"{size:.3f}" for size in sizes),
                all(abs(size - 1) < 1e-3 for size in sizes),
                always=True,
            ),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        figure, rows = plotting.subplots(2, 2, figsize=(10, 6.8))
        names = ["tall", "magnitude", "random", "sum"]
        for (left, right), (setting, found) in zip(rows, (("facts", runs), ("digits", [run["digits"] for run in runs])), strict=True):
            for offset, figures in enumerate(found):
                left.bar(np.arange(len(names)) + 0.25 * offset, [figures[name] for name in names], 0.22, label=f"seed {runs[offset]['seed']}")
                right.bar(np.arange(len(figures["active"])) + 0.25 * offset, figures["active"], 0.22)
            left.set_xticks(np.arange(len(names)) + 0.25, names)
            left.set(title=f"{setting}: share of single-expert accuracy")
            left.legend()
            right.set(title=f"{setting}: share of weights", xlabel="experts that need them")
        plotting.save(figure, path)


_done: dict[int, Figures] = {}
"""Figures by seed: the control takes some of them away and measures nothing anew."""


def _figures(seed: int, work: Path, say: Say) -> Figures:
    material = facts.prepare(seed, say)
    fields = list(material.experts)
    bench = Bench([material.base, *material.experts.values()])
    single = {
        half: {field: bench.alone(material.experts[field], of_field(some[field])).value for field in fields}
        for half, some in (("chosen", material.chosen_on), ("reported", material.reported_on))
    }
    say(f"seed {seed}: thresholds")
    packed = tall_masks.bundle(material.base, material.experts, work / "bundle", validate={field: of_field(material.chosen_on[field]) for field in fields})
    thresholds = [expert["threshold"] for expert in tall_masks.contents(packed)["experts"]]
    tall = []
    for field in fields:
        expert = tall_masks.reconstruct(packed, field, work / field)
        tall.append(bench.alone(expert, of_field(material.reported_on[field])).value / single["reported"][field])
    told = tall_masks.report(packed)

    def share(model: nn.Module, field: str) -> float:
        return facts.accuracy(model, material.base.tokenizer, material.reported_on[field]) / single["reported"][field]

    others = plain_masks.measured(seed, material.base, material.experts, material.base.model(), told["density"], share)
    say(f"seed {seed}: merging")
    merging = _merging(bench, material, single, thresholds, told["active"])
    items = material.base.tensors.nbytes // 4
    return {
        "bases": bases.digests({"base": material.base, **material.experts}),
        "single": single["reported"],
        "thresholds": thresholds,
        "tall": float(np.mean(tall)),
        **others,
        "density": told["density"],
        "active": told["active"],
        "bytes_over_formula": told["bytes"] / (items * (32 + 32 + len(fields)) / 8),
        "merging": merging,
    }


def _merging(bench: Bench, material: FactExperts, single: dict[str, dict[str, float]], thresholds: list[float], active: list[float]) -> Figures:
    choose = measure_of(material.chosen_on, single["chosen"])
    report = measure_of(material.reported_on, single["reported"])
    scales = [{"scale": scale} for scale in SCALES]
    consensus = [{"scale": s, "thresholds": thresholds, "min_tasks": k} for k in (1, 2) for s in SCALES]
    found: Figures = {
        "base": bench.alone(material.base, report).value,
        "mean": bench.score(configure("operation", {"name": "task-arithmetic", "scale": 1 / len(material.experts)}), report).value,
        "task-arithmetic": tuned(bench, choose, report, "task-arithmetic", scales),
        "ties": tuned(bench, choose, report, "ties", [{"scale": s, "density": d, "scope": "model", "aggregate": "sum"} for d in (0.2, 0.5) for s in SCALES]),
        "consensus": tuned(bench, choose, report, "consensus", consensus),
        "consensus_2": tuned(bench, choose, report, "consensus", consensus[len(SCALES) :]),
    }
    best = found["consensus"]["options"]
    chance = ByChance(**best, share=sum(active[best["min_tasks"] :]))
    found["by_chance"] = {"options": best | {"share": chance.share}, "value": bench.score(chance, report).value}
    return found
