"""How far equivalent prompt formats move a score, beyond what noise does (card 43, proof b)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cairn import plotting
from cairn.catalog import Paper, register
from cairn.checkpoint.format import read
from cairn.data import datasets
from cairn.evaluation import grammar
from cairn.evaluation.audits.spread import order_flip, spread_of, thompson
from cairn.evaluation.grammar import PromptFormat
from cairn.evaluation.items import observe
from cairn.evaluation.measurements.formats import Formats
from cairn.randomness import seed_for, uniform
from cairn.studies.bases import run_of
from cairn.studies.conditions import Condition, at_most, judged, stated
from cairn.studies.study import Figures, Say, Study

TASKS = {
    "first_word_letter": ("Word", "First letter"),
    "second_word_letter": ("Word", "Second letter"),
    "num_to_verbal": ("Number", "In words"),
    "singular_to_plural": ("Singular", "Plural"),
}
"""What input and output of each task are called, which also tells the tasks apart."""
FORMATS, STEPS, EXAMPLES = 48, 1500, 1900


def recipe(seed: int, corpus: Path) -> dict[str, Any]:
    """Byte-level LLaMA of 0.1M parameters, whole examples in each window."""
    return {
        "seed": seed,
        "model": {"name": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4},
        "data": {"tokenizer": "byte", "sources": {"tasks": {"corpus": str(corpus)}}, "sequence_length": 128, "packing": "whole", "held_out": 0.0},
        "optimizer": {"name": "adamw", "lr": 4e-3},
        "schedule": {"name": "cosine", "warmup": "50 steps"},
        "training": {"tokens": f"{STEPS} steps", "batch": 1024, "compile": False},
        "checkpoint": {"every": "100%", "also": [f"{STEPS * 3 // 4} steps"]},
    }


@register(
    "study",
    "format-spread",
    paper=Paper("Quantifying Language Models' Sensitivity to Spurious Features in Prompt Design", "arXiv:2310.11324", card=43),
)
class FormatSpreadStudy(Study):
    """A model that knows one format loses much in others; one that has seen many does not; noise explains neither."""

    minutes: ClassVar[float] = 9
    published: ClassVar[str] = (
        "Meaning-preserving formats move few-shot accuracy by up to 76 points (LLaMA-2-13B, one task); the spread persists with size, more shots and "
        "instruction tuning, and format quality correlates only weakly between models."
    )
    protocol: ClassVar[str] = (
        "A byte-level LLaMA of 0.1M parameters is TRAINED (not prompted) for 1500 steps of 1024 bytes on four text-to-text tasks of "
        "instruction-induction (first letter, second letter, number in words, plural: what a model of this size can learn, tried on seed 99), all in one "
        "format; a second one, equal in all else, with a format drawn for each example from the whole grammar. Both are asked the 100 held-out items of "
        "each task in the same 48 formats, exact match of greedy decoding. Spread is the largest minus the smallest accuracy, read against the spread that "
        "permuting each item's outcomes among formats gives. Thompson sampling with a quarter of the outcomes searches the same tables. Order flips "
        "between the checkpoints at 75 % and 100 % are estimated from three quarters of the formats and compared with all of them. What shows is "
        "out-of-format generalisation, not in-context sensitivity of large models. Three seeds."
    )
    control: ClassVar[str] = "The model that knows one format is replaced by the one that has seen all formats."

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        models = {}
        for name in ("fixed", "random"):
            corpus = _corpus(work / f"{name}.jsonl", seed, varied=name == "random" or sabotage)
            run = run_of(recipe(seed, corpus))
            models[name] = {"earlier": run.checkpoints()[0], "last": run.checkpoints()[-1]}
        found: Figures = {"tasks": {}}
        for task in TASKS:
            measurement = _measurement(work, task)
            tables = {name: _table(paths["last"], measurement) for name, paths in models.items()}
            found["tasks"][task] = _figures(tables, _table(models["fixed"]["earlier"], measurement), seed)
        return found

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        known = [sum(f["default"] >= 0.6 for f in run["tasks"].values()) for run in runs]
        moved = [[name for name, f in run["tasks"].items() if f["fixed_excess"] >= 0.2 and f["fixed_p"] < 0.05] for run in runs]
        shares = [[run["tasks"][name]["random_excess"] / run["tasks"][name]["fixed_excess"] for name in names] for run, names in zip(runs, moved, strict=True)]
        searched = [max(f["search_error"] for f in run["tasks"].values()) for run in runs]
        flips = [[f["flip_error"] for f in run["tasks"].values() if abs(f["flip_gap"]) <= 0.03] for run in runs]
        return [
            stated(
                "tasks with accuracy >= 0.6 in the format of training",
                ">= 3 in every seed",
                ", ".join(map(str, known)),
                all(count >= 3 for count in known),
                main=True,
            ),
            stated(
                "tasks whose spread exceeds the null by >= 0.20 (p < 0.05)",
                ">= 3 in every seed",
                ", ".join(str(len(names)) for names in moved),
                all(len(names) >= 3 for names in moved),
                main=True,
            ),
            stated(
                "spread beyond the null, many formats over one",
                "<= 0.5 on >= 3 of those tasks, in every seed",
                " | ".join(", ".join(f"{share:.2f}" for share in each) or "none" for each in shares),
                all(sum(share <= 0.5 for share in each) >= 3 for each in shares),
            ),
            judged("search with a quarter of the outcomes: largest error of an end", searched, at_most(0.05)),
            judged(
                "probability that two checkpoints within 0.03 change order, from 36 formats against all 48: mean error",
                [float(np.mean(each)) if each else math.nan for each in flips],
                at_most(0.05),
                found=", ".join(f"{np.mean(each):.3f}" if each else "none as close" for each in flips),
            ),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        figure, axes = plotting.subplots(1, 2, figsize=(11, 3.8), sharey=True)
        for axis, name in zip(axes, ("fixed", "random"), strict=True):
            for place, task in enumerate(TASKS):
                for run in runs:
                    f, x = run["tasks"][task], place + 0.2 * (run["seed"] - 1)
                    axis.plot([x, x], [f[f"{name}_low"], f[f"{name}_high"]], color=f"C{run['seed']}", linewidth=4, solid_capstyle="butt")
                    middle = (f[f"{name}_low"] + f[f"{name}_high"]) / 2
                    axis.plot([x + 0.07] * 2, [middle - f[f"{name}_null"] / 2, middle + f[f"{name}_null"] / 2], color="grey", linewidth=2)
            axis.set_xticks(range(len(TASKS)), [task.replace("_", "\n") for task in TASKS], fontsize=7)
            axis.set(title=f"trained in {'one format' if name == 'fixed' else 'many formats'} (grey: spread of noise)", ylabel="accuracy over 48 formats")
        plotting.save(figure, path)


def _corpus(path: Path, seed: int, *, varied: bool) -> Path:
    """Examples of all tasks, each in the default format or in one of its own."""
    formats = list(grammar.every())
    lines = []
    for task, names in TASKS.items():
        asked = set(_examples("execute", task))
        examples = [example for example in _examples("induce", task) if example not in asked]
        order = np.argsort(uniform(seed_for(seed, "examples", task), np.arange(len(examples))), kind="stable")[:EXAMPLES]
        for number in order.tolist():
            chosen = formats[int(uniform(seed_for(seed, "format", task), number) * len(formats))] if varied else PromptFormat()
            given, answer = examples[number]
            lines.append(chosen.written([(names[0], given), (names[1], answer)]) + "\n")
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def _examples(split: str, task: str) -> list[tuple[str, str]]:
    values = next(row["value"] for row in datasets.rows("instruction-induction", f"{split}/{task}.json") if row["key"] == "examples")
    return [(example["input"], example["output"]) for example in values.values()]


def _measurement(work: Path, task: str) -> Formats:
    asked = set(_examples("execute", task))
    path = work / f"{task}.jsonl"
    path.write_text("".join(json.dumps({"input": given, "output": answer}) + "\n" for given, answer in sorted(asked)))
    return Formats(path=path, formats=FORMATS, descriptors=(*TASKS[task], "Option"))


def _table(checkpoint: Path, measurement: Formats) -> NDArray[np.float64]:
    return np.array(observe(read.open(checkpoint), measurement)["outcomes"], np.float64)


def _figures(tables: dict[str, NDArray[np.float64]], earlier: NDArray[np.float64], seed: int) -> Figures:
    last = tables["fixed"]
    found: Figures = {"default": float(last[0].mean())}
    for name, table in tables.items():
        spread = spread_of(table, seed)
        found |= {f"{name}_low": spread.low, f"{name}_high": spread.high, f"{name}_null": spread.null, f"{name}_p": spread.p}
        found |= {f"{name}_excess": spread.spread - spread.null, f"{name}_held_out": spread.held_out, f"{name}_interval": list(spread.excess)}
    budget = last.size // 4
    ends = thompson(lambda row, begin, end: last[row, begin:end], len(last), last.shape[1], budget, default=found["default"], seed=seed)
    means = last.mean(axis=1)
    found["search_error"] = float(max(means[ends.low] - means.min(), means.max() - means[ends.high]))
    some = [row for row in range(len(last)) if row % 4 != 3]
    flip, exhaustive = order_flip(last[some], earlier[some], seed=seed), order_flip(last, earlier, seed=seed)
    return found | {"flip": flip["flip"], "flip_error": abs(flip["flip"] - exhaustive["flip"]), "flip_gap": flip["default_gap"]}
