"""Which curves over training repeat at other sizes, and what they predict: Pythia's public results, and runs of our own (card 03)."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cairn import plotting
from cairn.catalog import Paper, register
from cairn.data import datasets
from cairn.evaluation import analysis, curves, harness_results
from cairn.evaluation.measure import ResultRow, evaluate
from cairn.randomness import seed_for, uniform
from cairn.statistics import kendall
from cairn.studies import library
from cairn.studies.conditions import Condition, at_least, between, judged, stated
from cairn.studies.study import Figures, Say, Study
from cairn.training.run import train

TOKENS = 8 * 96
"""Tokens of a step."""
STEPS = [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 256, 384]
SIZES = {"0.1M": (48, 128, 2, 4), "0.4M": (96, 256, 3, 4), "1.5M": (160, 432, 5, 4)}
TASKS: list[Any] = [
    {"name": "held-out", "sequences": 32},
    {"name": "next-line", "places": 120, "context": 100},
    {"name": "brackets", "places": 180, "context": 80},
    {"name": "gsm8k", "problems": 20},
]
OWN = ("brackets", "next-line")
PYTHIA = {
    "lambada": ("lambada_openai", "acc"),
    "piqa": ("piqa", "acc"),
    "arc_easy": ("arc_easy", "acc"),
    "sciq": ("sciq", "acc"),
    "arc_challenge": ("arc_challenge", "acc_norm"),
    "winogrande": ("winogrande", "acc"),
    "mmlu": ("hendrycksTest", "acc"),
    "logiqa": ("logiqa", "acc_norm"),
    "wsc": ("wsc", "acc"),
}
KNOWN = ("arc_easy", "piqa", "sciq")
CARD: dict[str, dict[str, Any]] = {
    "similarity": {
        "lambada": 0.997,
        "piqa": 0.992,
        "arc_easy": 0.992,
        "sciq": 0.995,
        "arc_challenge": 0.942,
        "winogrande": 0.817,
        "mmlu": 0.587,
        "logiqa": 0.283,
        "wsc": 0.0,
    },
    "known": {"arc_challenge": 0.0113, "winogrande": 0.0142, "piqa": 0.0074, "mmlu": 0.0047},
    "loss": {"arc_challenge": 0.0293, "winogrande": 0.0297, "piqa": 0.0237, "mmlu": 0.0068},
    "size and step": {"arc_challenge": 0.0133, "winogrande": 0.0182, "piqa": 0.0095, "mmlu": 0.0057},
    "r2": {"logiqa": 0.33, "wsc": -0.17},
    "ranking": {"lambada": (0.86, 0.98), "arc_easy": (0.90, 0.93), "logiqa": (0.00, 0.21), "wsc": (0.00, 0.26)},
}
"""Values computed for the card from the same files, to be met within 0.01."""


def recipe(seed: int, size: str) -> dict[str, Any]:
    """Byte-level LLaMA on Python's library source; 384 steps of 768 tokens with 14 checkpoints, about log-spaced."""
    width, inner, layers, heads = SIZES[size]
    return {
        "seed": seed,
        "model": {"name": "llama", "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads},
        "data": {"tokenizer": "byte", "sources": {"source": {"corpus": library.source("8 MiB")}}, "sequence_length": 96},
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "schedule": {"name": "cosine", "warmup": "20 steps"},
        "training": {"tokens": f"{STEPS[-1]} steps", "batch": TOKENS, "compile": False},
        "checkpoint": {"every": f"{STEPS[-1]} steps", "also": [f"{step} steps" for step in STEPS]},
    }


@register(
    "study",
    "fine-line",
    paper=Paper("The Fine Line: Navigating Large Language Model Pretraining with Down-streaming Capability Analysis", "arXiv:2404.01204", card=3),
)
class FineLine(Study):
    """Some tasks follow the same path at every size and tell how unseen ones will do; others do not."""

    minutes: ClassVar[float] = 10
    published: ClassVar[str] = (
        "Specific downstream metrics have similar training dynamics across sizes up to 67B, and known tasks predict unseen ones of the same domain "
        "(figures are not in the abstract; the card's are computed from Pythia's public results)."
    )
    protocol: ClassVar[str] = (
        "Pythia v1, zero-shot, from step 1000: mean Pearson r over the six deduplicated sizes from 410M; prediction of an unseen task from arc_easy, piqa "
        "and sciq (without the target), least squares over 16 models, leaving one size out, against log LAMBADA perplexity alone and against log step, log "
        "size and their product; Kendall tau of the ranking of 16 models with the final one. Own runs: byte-level LLaMAs of 0.1M, 0.4M and 1.5M "
        "parameters, 384 steps of 768 tokens of python-source, 14 checkpoints, each measured on held-out text, next line among four, closing brackets, and "
        "GSM8K results by likelihood; r over sizes after the floor, and with the steps of one side shuffled (mean of 50 shuffles). Three seeds; own conditions "
        "must hold in each."
    )
    control: ClassVar[str] = "The checkpoints of every run, Pythia's and our own, are put in random order."

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        rows = [ResultRow(**row) for row in self._own(seed, work, say)]
        public = pythia()
        if sabotage:
            rows, public = _shuffled(rows, seed), {name: _shuffled_curves(found, seed) for name, found in public.items()}
        return {"own": own_figures(rows, seed), **public_figures(public)}

    def _own(self, seed: int, work: Path, say: Say) -> list[dict[str, Any]]:
        """Rows of the three runs. The control reads those of its seed: it differs in their order alone."""
        kept = work.parent / f"seed-{seed}" / "rows.json"
        if not kept.exists():
            found = []
            for size in SIZES:
                say(f"fine-line: seed {seed}, {size}")
                found += [asdict(row) for row in evaluate(train(recipe(seed, size), work / size).path, TASKS)]
            (work / "rows.json").write_text(json.dumps(found))
            return found
        return list(json.loads(kept.read_text()))

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        first, card, high = runs[0], ", ".join(CARD["known"]), at_least(0.9)
        holds = [t for t in ("lambada", "piqa", "arc_easy", "sciq") if first["similarity"][t] >= 0.98]
        fails = [t for t in ("logiqa", "wsc") if first["similarity"][t] < 0.5]
        skilled = [t for t in CARD["known"] if first["known"][t] < first["loss"][t]]
        best = [t for t in CARD["known"] if first["known"][t] < min(first["loss"][t], first["size and step"][t])]
        unskilled = [t for t in CARD["r2"] if first["known"][t] >= min(first["loss"][t], first["size and step"][t])]
        early = {t: tau for t, tau in first["ranking_1000"].items() if tau > 0.03}
        phases = {phase for run in runs for phase in run["own"]["gsm8k"]}
        found = []
        for name, expected in CARD.items():
            gap = _gap(first[name], expected)
            found.append(stated(f"Pythia: {name}, as computed for the card", "all within 0.01", f"largest difference {gap:.4f}", gap <= 0.01, always=True))
        return [
            *found,
            stated("Pythia: r >= 0.98 over sizes", "lambada, piqa, arc_easy, sciq", ", ".join(holds), len(holds) == 4, main=True, always=True),
            stated("Pythia: r < 0.5 over sizes", "logiqa, wsc: the claim fails", ", ".join(fails), len(fails) == 2, always=True),
            stated("Pythia: known tasks predict better than loss alone", card, ", ".join(skilled), len(skilled) == 4, main=True, always=True),
            stated("Pythia: known tasks predict better than both baselines", card, ", ".join(best), len(best) == 4, main=True),
            stated("Pythia: known tasks have no skill over both baselines", "logiqa, wsc", ", ".join(unskilled), len(unskilled) == 2, always=True),
            stated("Pythia: at step 1000 nothing is decided", "tau <= 0.03", str(early or "none above"), not early, always=True),
            *(
                judged(f"own runs: r of {task} over sizes after the floor", _figures(runs, "similarity", [task]), high, found=_off(runs, [task]), main=True)
                for task in OWN
            ),
            judged("own runs: r with shuffled steps", _figures(runs, "shuffled", OWN), between(-0.3, 0.3), found=_off(runs, OWN, "shuffled")),
            stated("own runs: the phase of GSM8K", "floor, every run", ", ".join(sorted(phases)), phases == {"floor"}),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        figure, axes = plotting.subplots(1, 3, figsize=(13, 3.6))
        for axis, task in zip(axes, OWN, strict=False):
            for run in runs:
                for number, (size, curve) in enumerate(run["own"]["curves"][task].items()):
                    axis.plot(list(map(int, curve)), list(curve.values()), color=f"C{number}", alpha=0.7, label=size if run is runs[0] else None)
            axis.set(xscale="log", xlabel="step", title=f"{task}: accuracy")
            axis.legend()
        axes[2].barh(list(runs[0]["similarity"]), list(runs[0]["similarity"].values()))
        axes[2].set(title="Pythia: r over sizes, from step 1000")
        plotting.save(figure, path)


@functools.cache
def pythia() -> dict[str, analysis.Curves]:
    """Zero-shot curves of 16 models, by task; `perplexity` is the logarithm of LAMBADA's."""
    rows = [row for row in harness_results.load(datasets.find("pythia-evals") / "pythia-v1.zip") if row.protocol.endswith("0-shot, zero-shot")]
    found = {
        name: analysis.curves_of(rows, functools.partial(_begins, task) if task == "hendrycksTest" else task, metric) for name, (task, metric) in PYTHIA.items()
    }
    perplexity = analysis.curves_of(rows, "lambada_openai", "ppl")
    found["perplexity"] = {run: {step: math.log(value) for step, value in curve.items()} for run, curve in perplexity.items()}
    return {name: analysis.after(curve, 1000) for name, curve in found.items()}


def _begins(group: str, task: str) -> bool:
    return task.startswith(group)


def public_figures(tables: dict[str, analysis.Curves]) -> Figures:
    """Similarity, prediction and early ranking of Pythia's tasks."""
    large = [run for run in tables["piqa"] if "deduped" in run and (harness_results.size_of(run) or 0) >= 4e8]
    figures: Figures = {"similarity": {t: curves.similarity({run: tables[t][run] for run in large})[0] for t in PYTHIA}}
    targets = [*CARD["known"], *CARD["r2"]]
    predictions = {target: _predicted(tables, target) for target in targets}
    for name in ("known", "loss", "size and step"):
        figures[name] = {target: predictions[target][name].error for target in targets}
    figures["r2"] = {target: predictions[target]["known"].r2 for target in CARD["r2"]}
    ranked = {task: curves.decision_step(tables[task])[1] for task in CARD["ranking"]}
    figures["ranking"] = {task: (taus[13000], taus[33000]) for task, taus in ranked.items()}
    figures["ranking_1000"] = {task: taus[1000] for task, taus in ranked.items()}
    return figures


def _predicted(tables: dict[str, analysis.Curves], target: str) -> dict[str, curves.Prediction]:
    known = [task for task in KNOWN if task != target]
    features: dict[str, list[list[float]]] = {"known": [], "loss": [], "size and step": []}
    values, groups = [], []
    for run, curve in tables[target].items():
        size = harness_results.size_of(run) or 0.0
        for step in sorted(set(curve).intersection(*(tables[task][run] for task in known), tables["perplexity"][run])):
            features["known"].append([tables[task][run][step] for task in known])
            features["loss"].append([tables["perplexity"][run][step]])
            features["size and step"].append([math.log(step), math.log(size), math.log(step) * math.log(size)])
            values.append(curve[step])
            groups.append(size)
    return {name: curves.left_out(np.array(each), np.array(values), groups) for name, each in features.items()}


def own_figures(rows: Sequence[ResultRow], seed: int) -> Figures:
    """Similarity of our own curves after the floor, the same with one side shuffled, and the phase of what small models cannot do."""
    figures: Figures = {"similarity": {}, "shuffled": {}, "curves": {}}
    for task in OWN:
        later = {}
        for run in SIZES:
            points = sorted((r for r in rows if (r.run, r.task, r.metric) == (run, task, "accuracy")), key=lambda r: r.step or 0)
            begin = curves.onset([p.value for p in points], [p.stderr for p in points], points[0].chance or 0)
            if begin is not None:
                later[run] = {p.step or 0: p.value for p in points[begin:]}
        figures["curves"][task] = {run: {str(s): v for s, v in curve.items()} for run, curve in analysis.curves_of(rows, task, "accuracy").items()}
        if len(later) > 1:
            figures["similarity"][task] = curves.similarity(later)[0]
            mixed = [_half_shuffled(later, seed_for(seed, task, number)) for number in range(50)]
            figures["shuffled"][task] = float(np.mean([curves.similarity(each)[0] for each in mixed]))
    figures["gsm8k"] = [t.phase for t in analysis.analyse([r for r in rows if (r.task, r.metric) == ("gsm8k", "accuracy")]).tasks]
    figures["bits_per_byte"] = {run: list(curve.values()) for run, curve in analysis.curves_of(rows, "held-out", "bits_per_byte").items()}
    taus = {run: kendall(list(c), list(c.values())) for run, c in analysis.curves_of(rows, "held-out", "bits_per_byte").items()}
    return figures | {"tau_of_bits_per_byte": taus}


def _half_shuffled(found: analysis.Curves, seed: int) -> analysis.Curves:
    """All but the first run with their values at other steps."""
    names = list(found)
    return {names[0]: found[names[0]], **_shuffled_curves({name: found[name] for name in names[1:]}, seed)}


def _shuffled_curves(found: analysis.Curves, seed: int) -> analysis.Curves:
    mixed = {}
    for run, curve in found.items():
        order = np.argsort(uniform(seed_for(seed, "shuffle", run), np.arange(len(curve))))
        mixed[run] = dict(zip(curve, [list(curve.values())[i] for i in order], strict=True))
    return mixed


def _shuffled(rows: Sequence[ResultRow], seed: int) -> list[ResultRow]:
    """The rows of every run under other steps of the same run."""
    found = []
    for run in SIZES:
        order = np.argsort(uniform(seed_for(seed, "rows", run), np.arange(len(STEPS))))
        moved = {step: STEPS[i] for step, i in zip(STEPS, order, strict=True)}
        found += [
            ResultRow(**asdict(row) | {"step": moved[row.step], "tokens": moved[row.step] * TOKENS}) for row in rows if row.run == run and row.step in moved
        ]
    return found


def _gap(found: dict[str, Any], expected: dict[str, Any]) -> float:
    return max(float(np.max(np.abs(np.subtract(found[key], value)))) for key, value in expected.items())


def _values(runs: Sequence[Figures], key: str, tasks: Sequence[str]) -> list[float | None]:
    return [run["own"][key].get(task) for run in runs for task in tasks]


def _figures(runs: Sequence[Figures], key: str, tasks: Sequence[str]) -> list[float]:
    """A figure of each seed and task; not a number where the task never left the floor."""
    return [math.nan if value is None else value for value in _values(runs, key, tasks)]


def _off(runs: Sequence[Figures], tasks: Sequence[str], key: str = "similarity") -> str:
    return ", ".join("never off the floor" if value is None else f"{value:.3f}" for value in _values(runs, key, tasks))
