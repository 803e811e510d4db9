"""A planted leak: does the audit find items that were trained on, and only those (card 81, proof b)?"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cairn import plotting
from cairn.catalog import Paper, register
from cairn.data import datasets
from cairn.errors import InputError
from cairn.evaluation.items import Seen, observe
from cairn.evaluation.measurements.leakage import Leakage, block
from cairn.randomness import seed_for, uniform
from cairn.studies.bases import run_of, stage_of
from cairn.studies.conditions import Condition, at_least, judged, stated
from cairn.studies.study import Figures, Say, Study

EACH, LONGEST = 60, 140
COPIES = {"control": 0, "unseen": 0, "leaked-3": 3, "leaked-10": 10, "leaked-30": 30, "shuffled-30": 30}
"""How often the items of each group are in the training data; the shuffled ones in an order drawn once and frozen."""
FIRST_STEPS, BATCH = 200, 2048


def recipe(seed: int, corpus: Path, steps: int) -> dict[str, Any]:
    """Byte-level LLaMA of 0.25M parameters."""
    return {
        "seed": seed,
        "model": {"name": "llama", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
        "data": {"tokenizer": "byte", "sources": {"questions": {"corpus": str(corpus)}}, "sequence_length": 256, "held_out": 0.0},
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "schedule": {"name": "constant", "warmup": "40 steps"},
        "training": {"tokens": f"{steps} steps", "batch": BATCH, "compile": False},
        "checkpoint": {"every": f"{steps} steps"},
    }


@register("study", "leakage", paper=Paper("Training on the Benchmark Is Not All You Need", "arXiv:2409.01790", card=81))
class LeakageStudy(Study):
    """The calibrated audit finds planted items by their option order, the published thresholds do not tell them from clean ones."""

    minutes: ClassVar[float] = 7
    published: ClassVar[str] = (
        "Items that two models were continually pretrained on are found by their option order; 31 open models are ranked by the share of flagged items "
        "(thresholds -0.2, -0.17, -0.15 of an isolation forest). Accuracy and F1 of the detector are not in the abstract."
    )
    protocol: ClassVar[str] = (
        "1,000 real questions (CMB), options A to D, items of at most 140 bytes in six groups of 60: control, unseen, leaked in published order 3, 10 and 30 "
        "times, leaked 30 times in an order drawn once and frozen. A byte-level LLaMA of 0.25M parameters first trains 200 steps of 2048 bytes on the other "
        "questions in random option orders, then reads one pass over the leaked copies and the others once more. All 24 orders of every item are scored after "
        "both stages; the checkpoint of the first stage is the reference. Groups share one model, so the dose is compared within it. Raw ranks against the "
        "control decide, with the reference-adjusted ones, scenario b and the published thresholds beside them. Lengths were tried on seed 99. Three seeds."
    )
    control: ClassVar[str] = "The leaked items are left out of the second stage; the audit of the same groups must then find nothing."

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        groups, background = split(seed)
        audit = _written(work, groups)
        first = run_of(recipe(seed, _corpus(work / "background.jsonl", _shuffled_copies(background, 4, seed)), FIRST_STEPS)).newest()
        leaked = [] if sabotage else _leaked(groups, seed)
        second = _corpus(work / "second.jsonl", [*leaked, *_shuffled_copies(background, 1, seed + 1000)])
        steps = second.stat().st_size // BATCH - 1
        last = stage_of(recipe(seed, second, steps), first.path).newest()
        seen = {"before": observe(first, audit), "after": observe(last, audit)}
        return {"steps": steps, **_figures(audit, seen, groups)}

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        def each(*path: str) -> list[float]:
            found: list[Any] = list(runs)
            for key in path:
                found = [value[key] for value in found]
            return found

        def quiet(name: str, *path: str, main: bool = False) -> Condition:
            """A rank test that must not reject."""
            found = each(*path)
            told = ", ".join(f"{p:.2f}" for p in found)
            return stated(f"{name}: rank test p", f">= 0.05 in at least 2 of {len(found)} seeds", told, sum(p >= 0.05 for p in found) >= 2, main=main)

        def loud(name: str, limit: float, *path: str, main: bool = False) -> Condition:
            """A test that must reject in every seed."""
            found = each(*path)
            return stated(name, f"< {limit:g}, in every seed", ", ".join(f"{p:.1e}" for p in found), max(found) < limit, main=main)

        aucs = {group: each("after", group, "a_auc") for group in ("unseen", "leaked-3", "leaked-10", "leaked-30")}
        firsts, control = each("after", "leaked-30", "a_first"), each("after", "leaked-30", "a_first_control")
        rises = all(sorted(dose) == list(dose) for dose in zip(*aucs.values(), strict=True))
        return [
            judged(
                "30 copies: share of items whose published order comes first, minus 3 times the control's",
                [a - 3 * max(b, 1 / EACH) for a, b in zip(firsts, control, strict=True)],
                at_least(0),
                found=", ".join(f"{a:.0%} / {b:.0%}" for a, b in zip(firsts, control, strict=True)),
                main=True,
            ),
            loud("30 copies: rank test p", 1e-3, "after", "leaked-30", "a_p", main=True),
            judged("30 copies: AUC", aucs["leaked-30"], at_least(0.7), form=".2f", main=True),
            judged("10 copies: AUC", aucs["leaked-10"], at_least(0.6), form=".2f"),
            quiet("no copies", "after", "unseen", "a_p", main=True),
            stated(
                "AUC does not fall with the number of copies",
                "0, 3, 10, 30 copies in order, in every seed",
                " | ".join(", ".join(f"{auc:.2f}" for auc in dose) for dose in aucs.values()),
                rises,
            ),
            quiet("before the leak is read: the same items", "before", "leaked-30", "a_p"),
            quiet("leaked in another order, scenario a", "after", "shuffled-30", "a_p"),
            loud("leaked in another order, scenario b calibrated: p against the control", 0.05, "after", "shuffled-30", "b_auc_p"),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        figure, (left, right) = plotting.subplots(1, 2, figsize=(10, 3.6))
        groups = [group for group in COPIES if group != "control"]
        for run in runs:
            left.plot(groups, [run["after"][group]["a_auc"] for group in groups], marker="o", label=f"seed {run['seed']}")
            left.plot(groups, [run["adjusted"][group]["a_auc"] for group in groups], marker="x", linestyle=":", color="grey")
        left.axhline(0.5, color="grey", linewidth=1)
        left.set(title="published order ranks higher than in control (dotted: minus reference)", ylabel="AUC")
        left.legend()
        for place, threshold in enumerate((-0.2, -0.17, -0.15)):
            rates = [[run["after"][group]["b_published"][place]["items"] for run in runs] for group in groups]
            control = np.mean([run["after"]["unseen"]["b_published"][place]["control"] for run in runs])
            right.plot(groups, np.mean(rates, axis=1), marker="o", label=f"threshold {threshold}")
            right.axhline(control, linestyle="--", color=f"C{place}", linewidth=1)
        right.set(title="share flagged at the published thresholds (dashed: control)")
        right.legend()
        for axis in (left, right):
            axis.tick_params(axis="x", labelrotation=20)
        plotting.save(figure, path)


Item = dict[str, Any]


def split(seed: int) -> tuple[dict[str, list[Item]], list[Item]]:
    """The six groups of items, drawn by the seed, and the questions that are left."""
    rows = [{"question": row["question"], "options": [row["option"][key] for key in "ABCD"]} for row in datasets.rows("leakage-questions")]
    short = [row for row in rows if len(set(row["options"])) == 4 and len("".join(block(row["question"], row["options"])).encode()) <= LONGEST]
    order = np.argsort(uniform(seed_for(seed, "groups"), np.arange(len(short))), kind="stable").tolist()
    groups = {name: [short[i] for i in order[place * EACH : (place + 1) * EACH]] for place, name in enumerate(COPIES)}
    if len(order) < EACH * len(COPIES):
        raise InputError(f"There are {len(order)} items of at most {LONGEST} bytes, {EACH * len(COPIES)} are needed.")
    taken = {id(row) for group in groups.values() for row in group}
    return groups, [row for row in rows if id(row) not in taken]


def _text(row: Item, order: Sequence[int]) -> str:
    return "".join(block(row["question"], [row["options"][i] for i in order]))


def _shuffled_copies(rows: Sequence[Item], copies: int, seed: int) -> list[str]:
    """Each row so many times, each time in another random order."""
    found = []
    for number, row in enumerate(rows):
        orders = np.argsort(uniform(seed_for(seed, "background", number), np.arange(4 * copies)).reshape(copies, 4), axis=1)
        found += [_text(row, order.tolist()) for order in orders]
    return found


def _leaked(groups: dict[str, list[Item]], seed: int) -> list[str]:
    found = []
    for name, copies in COPIES.items():
        for number, row in enumerate(groups[name]):
            order = list(range(4))
            if name.startswith("shuffled"):
                # Any order but the published one.
                order = [(place + 1 + int(uniform(seed_for(seed, "frozen"), number) * 3)) % 4 for place in order]
            found += [_text(row, order)] * copies
    return found


def _corpus(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def _written(work: Path, groups: dict[str, list[Item]]) -> Leakage:
    """One audit of all groups: their items one after the other, the control as control."""
    for name, members in (("items.jsonl", [row for group in COPIES if group != "control" for row in groups[group]]), ("control.jsonl", groups["control"])):
        (work / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in members), encoding="utf-8")
    return Leakage(path=work / "items.jsonl", control=work / "control.jsonl", orders=math.factorial(4))


def _figures(audit: Leakage, seen: dict[str, Seen], groups: dict[str, list[Item]]) -> Figures:
    """For each group the figures of the audit before and after the second stage, and after minus before."""
    found: Figures = {"before": {}, "after": {}, "adjusted": {}}
    begin = 0
    for name in groups:
        if name == "control":
            continue
        part = slice(begin, begin + EACH)
        begin += EACH
        parts = {stage: {key: values if key == "control" else values[part] for key, values in each.items()} for stage, each in seen.items()}
        for stage, reference in (("before", None), ("after", None), ("adjusted", parts["before"])):
            judged = audit.judge(parts["after" if stage == "adjusted" else stage], reference)
            found[stage][name] = {key: value for key, value in judged.items() if key != "items"}
    return found
