"""Masks that bring experts back out of their sum, and merges of what several experts need (card 26, proofs b and c)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from cairn.catalog import Paper, register
from cairn.checkpoint.walk import Piece
from cairn.data import random
from cairn.evaluate.measure import Score
from cairn.merge import tall_masks
from cairn.merge.arithmetic import task_vectors
from cairn.merge.coefficients import at
from cairn.merge.consensus import Consensus
from cairn.merge.objective import Bench, Measure
from cairn.merge.task_arithmetic import added
from cairn.options import configure
from cairn.studies import bases
from cairn.studies.merge import facts
from cairn.studies.merge.facts import Experts, Fact
from cairn.studies.study import Criterion, Figures, Say, Study

if TYPE_CHECKING:
    from torch import nn

SCALES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)


def measure_of(some: dict[str, list[Fact]], normal: dict[str, float]) -> Measure:
    """Mean over fields of accuracy divided by the expert's own."""

    def measure(model: nn.Module, tokenizer: Any) -> Score:
        shares = [facts.accuracy(model, tokenizer, some[field]) / normal[field] for field in some]
        return Score("facts", "normalised accuracy", float(np.mean(shares)), float("nan"), sum(map(len, some.values())))

    return measure


def of_field(some: Sequence[Fact]) -> Measure:
    """Accuracy on one field."""
    return lambda model, tokenizer: Score("facts", "accuracy", facts.accuracy(model, tokenizer, some), float("nan"), len(some))


def tuned(bench: Bench, choose: Measure, report: Measure, method: str, grid: Sequence[dict[str, Any]]) -> Figures:
    """The options of a grid that are best by `choose`, and what `report` says of them."""
    best = max(grid, key=lambda options: bench.score(configure("operation", {"name": method, **options}), choose).value)
    return {"options": best, "value": bench.score(configure("operation", {"name": method, **best}), report).value}


class ByChance(Consensus):
    """Keeps as many weights as consensus does, chosen at random."""

    share: float

    def blend(self, piece: Piece, known: object) -> torch.Tensor:
        places = np.arange(piece.begin, piece.begin + piece.size)
        kept = torch.from_numpy(random.uniform(random.seed_for(0, "by chance", piece.name), places) < self.share)
        return added(piece.inputs[0], task_vectors(piece.inputs).sum(0) * kept, at(self.scale, piece.name))


@register("study", "tall-masks", paper=Paper("Localizing Task Information for Improved Model Merging and Compression", "arXiv:2405.07813", card=26))
class Localized(Study):
    """One bit per weight brings an expert back out of the sum of six; weights that no or one expert needs disturb a merge."""

    minutes: ClassVar[float] = 12
    published: ClassVar[str] = (
        "Masks on the multi-task vector keep more than 99 % of single-task accuracy up to 20 tasks (57 GB to 8.2 GB); "
        "consensus improves task arithmetic and TIES."
    )
    protocol: ClassVar[str] = (
        "A decoder (3 layers, width 128, BPE 2048) learns 500 CounterFact records in three phrasings (360 steps of 2048 tokens, AdamW 3e-3, cosine). "
        "Six experts each learn 120 new facts of one field (60 steps of 512 tokens, AdamW 5e-4). Half of the facts choose thresholds (0.2 to 0.6), "
        "scales (0.2 to 0.8) and the number of tasks; the other half is reported, divided by the expert's own accuracy. TALL masks are built and taken "
        "back from a bundle on disk, beside a random and a magnitude mask of the same density. Gate for merging: tuned task arithmetic beats the base "
        "by 3 points. Three seeds; every condition in each."
    )
    control: ClassVar[str] = "Each expert is taken out of the sum with a random mask of its own mask's density, and consensus keeps weights by chance."

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        if seed not in _done:
            _done[seed] = _figures(seed, work, say)
        figures = _done[seed]
        if not sabotage:
            return figures
        merging = figures["merging"] | {"consensus": figures["merging"]["by_chance"]}
        return figures | {"tall": figures["random"], "merging": merging}

    def check(self, runs: Sequence[Figures]) -> list[Criterion]:
        def line(name: str, required: str, found: Callable[[Figures], float], holds: Callable[[Figures], bool], exact: bool = False) -> Criterion:
            return Criterion(name, required, ", ".join(f"{found(run):.3f}" for run in runs), all(holds(run) for run in runs), exact)

        def gain(run: Figures) -> float:
            return run["merging"]["consensus"]["value"] - run["merging"]["task-arithmetic"]["value"]

        def gate(run: Figures) -> float:
            return run["merging"]["task-arithmetic"]["value"] - run["merging"]["base"]

        return [
            line("TALL reconstruction, share of single-expert accuracy", ">= 0.95", lambda r: r["tall"], lambda r: r["tall"] >= 0.95),
            line("random mask of the same density", "<= 0.55", lambda r: r["random"], lambda r: r["random"] <= 0.55),
            line("magnitude mask of the same density", "<= 0.90", lambda r: r["magnitude"], lambda r: r["magnitude"] <= 0.90),
            line("gate: tuned task arithmetic minus base", ">= 0.03", gate, lambda r: gate(r) >= 0.03),
            line("consensus (tasks chosen by validation) minus task arithmetic", ">= 0.01", gain, lambda r: gain(r) >= 0.01),
            line("bytes of the bundle over the formula", "1", lambda r: r["bytes_over_formula"], lambda r: abs(r["bytes_over_formula"] - 1) < 1e-3, True),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
        names = ["tall", "magnitude", "random", "sum"]
        for offset, run in enumerate(runs):
            left.bar(np.arange(len(names)) + 0.25 * offset, [run[name] for name in names], 0.22, label=f"seed {run['seed']}")
            right.bar(np.arange(len(run["active"])) + 0.25 * offset, run["active"], 0.22)
        left.set_xticks(np.arange(len(names)) + 0.25, names)
        left.set(title="share of single-expert accuracy")
        left.legend()
        right.set(title="share of weights by number of experts that need them", xlabel="experts")
        figure.savefig(path, dpi=130)
        pyplot.close(figure)


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
    others = _other_masks(seed, material, bench, list(told["density"].values()), single["reported"])
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


def _other_masks(seed: int, material: Experts, bench: Bench, densities: Sequence[float], single: dict[str, float]) -> dict[str, float]:
    """Random and magnitude masks of the same densities on the same sum, and the sum without any."""
    model = material.base.model()
    base = flat(material.base)
    vectors = [flat(expert) - base for expert in material.experts.values()]
    merged, found = sum(vectors, torch.zeros_like(base)), dict[str, list[float]](random=[], magnitude=[], sum=[])
    for number, (field, density) in enumerate(zip(material.experts, densities, strict=True)):
        drawn = torch.from_numpy(random.uniform(random.seed_for(seed, "mask", number), np.arange(base.numel())))
        size = vectors[number].abs()
        largest = size >= size.kthvalue(max(1, round((1 - density) * size.numel()))).values
        for name, mask in (("random", drawn < density), ("magnitude", largest), ("sum", torch.ones_like(largest))):
            load(model, base + merged * mask)
            found[name].append(facts.accuracy(model, material.base.tokenizer, material.reported_on[field]) / single[field])
    return {name: float(np.mean(values)) for name, values in found.items()}


def _merging(bench: Bench, material: Experts, single: dict[str, dict[str, float]], thresholds: list[float], active: list[float]) -> Figures:
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


def flat(checkpoint: Any) -> torch.Tensor:
    """All weights of a small checkpoint as one vector, by name."""
    return torch.cat([checkpoint.tensors[name].load().reshape(-1) for name in sorted(checkpoint.tensors)])


def load(model: nn.Module, vector: torch.Tensor) -> None:
    """Put such a vector into a model."""
    position, state = 0, model.state_dict()
    with torch.no_grad():
        for name in sorted(state):
            state[name].copy_(vector[position : position + state[name].numel()].view(state[name].shape))
            position += state[name].numel()
