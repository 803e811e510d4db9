"""An update that keeps what was right: does distilling from the old model where the student errs lose fewer items (card 59, proof b)?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cairn import plotting
from cairn.catalog import Paper, register
from cairn.checkpoint.format import read
from cairn.data import datasets
from cairn.data.text.tokenizer import byte_level
from cairn.evaluation.audits.flips import compare
from cairn.evaluation.items import Seen, observe
from cairn.evaluation.measurements.exact_answer import ExactAnswer
from cairn.randomness import seed_for, uniform
from cairn.statistics import paired_bootstrap
from cairn.studies.bases import run_of, stage_of
from cairn.studies.conditions import Condition, above, at_least, at_most, estimated, judged, stated
from cairn.studies.study import Figures, Say, Study

TASKS = ("first_word_letter", "second_word_letter", "num_to_verbal", "singular_to_plural")
EXAMPLES = 1900
"""Of each task: 85 % to train, 15 % to test."""
BASE_STEPS, TASK_STEPS, UPDATE_STEPS = 300, 700, 200
USABLE = 0.03
"""Negative flips from which on a task is used."""


def recipe(seed: int, corpus: Any, steps: int, rate: float, objective: Any = "causal-lm", also: Sequence[int] = ()) -> dict[str, Any]:
    """Byte-level LLaMA of 0.1M parameters."""
    return {
        "seed": seed,
        "model": {"name": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4},
        "data": {"tokenizer": "byte", "sources": {"text": {"corpus": corpus}}, "sequence_length": 128, "packing": "whole", "held_out": 0.0},
        "objective": objective,
        "optimizer": {"name": "adamw", "lr": rate},
        "schedule": {"name": "cosine", "warmup": "20 steps"},
        "training": {"tokens": f"{steps} steps", "batch": 1024, "compile": False},
        "checkpoint": {"every": f"{steps} steps", "also": [f"{step} steps" for step in also]},
    }


@register("study", "compatible-update", paper=Paper("MUSCLE: A Model Update Strategy for Compatible LLM Evolution", "arXiv:2407.09435", card=59))
class CompatibleUpdate(Study):
    """Distilling from the old model where the student errs lowers negative flips without losing the gain of the update."""

    minutes: ClassVar[float] = 8
    published: ClassVar[str] = (
        "HellaSwag, Llama 1 to 2: negative flips 10.27 %, -40.6 % with compatibility training at accuracy 72.91 to 79.53; PIQA -34.3 %, with the mask "
        "'student wrong' ahead of 'only old' (-25.8 %)."
    )
    protocol: ClassVar[str] = (
        "A byte-level LLaMA of 0.1M parameters reads tiny-shakespeare for 300 steps of 1024 bytes; its checkpoints at 30 % and 100 % are the old and the "
        "new base. Both are fine-tuned as a whole (instead of adapters) for 700 steps on four text-to-text tasks of instruction-induction that a model of "
        "this size can learn (first and second letter, number in words, plural), cross-entropy on the answers: M1 and M2. From M2, 200 more steps (i) with "
        "the compatibility loss, (ii) with the old model teaching everywhere, (iii) on cross-entropy alone (control 1: more training), (iv) as (i) with the "
        "old model of another seed (control 2). Exact match on 15 % of the items kept out; a task counts in a seed if M1 to M2 loses at least 3 % of its "
        "items. The floor is the flips between two seeds of M1. Intervals draw items again, the mean over seeds of each. An earlier setting (300 steps, "
        "larger animal and starting letter among the tasks) was given up in seed 0 since no task was learned."
    )
    control: ClassVar[str] = "There is no update: the old model stands where the new one should, and is compared with itself."

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        models = {"old": _old(seed, work)} if sabotage else _models(seed, work)
        found: Figures = {"tasks": {}}
        for task in TASKS:
            measurement = ExactAnswer(path=_test_file(work, task), template=f"{task}: {{input}} =")
            seen = {name: observe(read.open(path), measurement) for name, path in models.items()}
            if sabotage:
                found["tasks"][task] = self.honest(seed)["tasks"][task] | _flips({"old": seen["old"], "new": seen["old"]})
            else:
                found["tasks"][task] = _flips(seen)
        return found

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        used = [[figures for figures in run["tasks"].values() if figures["new"]["negative"] >= USABLE] for run in runs]
        count = sum(map(len, used))

        def means(arm: str, key: str) -> list[float]:
            """Of each seed that uses a task, the mean over its tasks."""
            return [float(np.mean([figures[arm][key] for figures in each])) for each in used if each]

        def apart(one: list[float], other: list[float]) -> list[float]:
            return [a - b for a, b in zip(one, other, strict=True)]

        def both(one: list[float], word: str, other: list[float]) -> str:
            return "; ".join(f"{a:.3f} {word} {b:.3f}" for a, b in zip(one, other, strict=True))

        before, after, only = means("new", "negative"), means("compatible", "negative"), means("old_only", "negative")
        plain, kept = means("new", "new"), means("compatible", "new")
        gap = max(abs(f["new"] - f["old"] - f["positive"] + f["negative"]) for f in _arms(runs))
        return [
            stated("tasks and seeds with at least 3 % negative flips", ">= 3", str(count), count >= 3, main=True),
            judged(
                "negative flips that the compatible update saves, share of the plain update's",
                [1 - b / a for a, b in zip(before, after, strict=True)],
                at_least(0.15),
                rule="mean",
                found=both(before, "to", after),
                main=True,
            ),
            judged(
                "accuracy of the compatible update minus that of the plain one",
                apart(kept, plain),
                at_least(-0.01),
                rule="mean",
                found=both(kept, "against", plain),
                main=True,
            ),
            judged(
                "negative flips, 'student wrong' minus 'only old'",
                apart(after, only),
                at_most(0.005),
                rule="mean",
                found=both(after, "against", only),
            ),
            _fewer("control 1: flips of more training minus flips of the compatible update, paired by item", runs, "more"),
            _fewer("control 2: flips with an unrelated old model minus flips of the compatible update, paired by item", runs, "unrelated"),
            stated("accuracy gained is positive minus negative flips, every model and task", "to 1e-12", f"{gap:.0e}", gap < 1e-12, always=True),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        figure, axes = plotting.subplots(1, len(TASKS), figsize=(3.4 * len(TASKS), 3.6))
        arms = ("new", "compatible", "old_only", "more", "unrelated")
        for axis, task in zip(axes, TASKS, strict=True):
            for run in runs:
                axis.plot(arms, [run["tasks"][task][arm]["negative"] for arm in arms], marker="o", label=f"seed {run['seed']}")
            axis.axhline(float(np.mean([run["tasks"][task]["twin"]["negative"] for run in runs])), linestyle="--", color="grey", label="seed floor")
            axis.set(title=task.replace("_", " "))
            axis.tick_params(axis="x", labelrotation=30)
        axes[0].set(ylabel="negative flips from the old model")
        axes[0].legend(fontsize=7)
        plotting.save(figure, path)


def _arms(runs: Sequence[Figures]) -> list[Figures]:
    return [arm for run in runs for figures in run["tasks"].values() for arm in figures.values()]


def _more_flips(runs: Sequence[Figures], arm: str) -> tuple[float, float]:
    """95 % interval of how many more items an arm flips than the compatible update; of each item the mean over the seeds that use its task."""
    differences: list[float] = []
    for task in TASKS:
        used = [run["tasks"][task] for run in runs if run["tasks"][task]["new"]["negative"] >= USABLE]
        if used:
            total = np.zeros(used[0]["new"]["n"])
            for figures in used:
                total[figures[arm]["flipped"]] += 1
                total[figures["compatible"]["flipped"]] -= 1
            differences += (total / len(used)).tolist()
    return paired_bootstrap(differences) if differences else (float("nan"), float("nan"))


def _flips(seen: dict[str, Seen]) -> Figures:
    """Of every model the flips from the old one."""
    old, found = seen["old"], {}
    for name, each in seen.items():
        if name != "old":
            flips = compare(old, each, seen.get("twin"))
            keys = ("n", "old", "new", "negative", "negative_interval", "positive", "p", "floor", "trust", "flipped")
            found[name] = {key: list(value) if isinstance(value := getattr(flips, key), tuple) else value for key in keys}
    return found


def _models(seed: int, work: Path) -> dict[str, Path]:
    """Checkpoints of the old and the new task model, a twin of the old one by another seed, and the four ways to go on from the new one."""
    old, new = _task_models(seed, work)
    twin = _fine_tuned(_base(seed)[0], seed + 500, _train_file(work))
    stranger = _task_models((seed + 1) % 3, work)[0]

    def updated(teachers: Mapping[str, Path] | None = None, **options: Any) -> Path:
        return _updated(seed, work, new, teachers, **options)

    return {
        "old": old,
        "new": new,
        "twin": twin,
        "compatible": updated({"old": old, "new": new}),
        "old_only": updated({"old": old, "new": new}, mask="old"),
        "more": updated(),
        "unrelated": updated({"old": stranger, "new": new}),
    }


def _old(seed: int, work: Path) -> Path:
    return _fine_tuned(_base(seed)[0], seed, _train_file(work))


def _updated(seed: int, work: Path, start: Path, teachers: Mapping[str, Path] | None = None, **options: Any) -> Path:
    objective = {"name": "compatible", **_answers(), **options}
    named = {"teacher": {name: str(path) for name, path in (teachers or {}).items()}}
    return stage_of(recipe(seed + 900, str(_train_file(work)), UPDATE_STEPS, 1e-3, objective) | named, start).checkpoints()[-1]


def _base(seed: int) -> list[Path]:
    return run_of(recipe(seed, "tiny-shakespeare", BASE_STEPS, 3e-3, also=[BASE_STEPS * 3 // 10])).checkpoints()


def _task_models(seed: int, work: Path) -> tuple[Path, Path]:
    old, new = (_fine_tuned(base, seed, _train_file(work)) for base in _base(seed))
    return old, new


def _fine_tuned(base: Path, seed: int, corpus: Path) -> Path:
    return stage_of(recipe(seed, str(corpus), TASK_STEPS, 2e-3, {"name": "compatible", **_answers()}), base).checkpoints()[-1]


def _answers() -> dict[str, Any]:
    tokenizer = byte_level()
    return {"marker": tokenizer.encode("="), "end": tokenizer.encode("\n")}


def _items(task: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Training and test items of a task, the same for every seed."""
    values = next(row["value"] for row in datasets.rows("instruction-induction", f"induce/{task}.json") if row["key"] == "examples")
    pairs = sorted({(example["input"], example["output"]) for example in values.values()})
    order = np.argsort(uniform(seed_for(0, "items", task), np.arange(len(pairs))), kind="stable")[:EXAMPLES].tolist()
    cut = len(order) * 85 // 100
    return [pairs[i] for i in order[:cut]], [pairs[i] for i in order[cut:]]


def _train_file(work: Path) -> Path:
    path = work / "train.jsonl"
    if not path.exists():
        lines = [f"{task}: {given} = {answer}\n" for task in TASKS for given, answer in _items(task)[0]]
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def _test_file(work: Path, task: str) -> Path:
    path = work / f"{task}.jsonl"
    path.write_text("".join(json.dumps({"input": given, "output": f" {answer}"}) + "\n" for given, answer in _items(task)[1]))
    return path


def _fewer(name: str, runs: Sequence[Figures], arm: str) -> Condition:
    """The compatible update flips fewer items than an arm that should not help."""
    low, high = _more_flips(runs, arm)
    return estimated(
        name, "95 % interval over items above 0", f"interval {low:+.4f} to {high:+.4f}" if low == low else "no item differs", (low, high), above(0)
    )
