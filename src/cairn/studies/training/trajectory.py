"""A run read checkpoint by checkpoint: loss, word order, samples, and a change of hardware on the way (card 01, proof c)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from cairn import plotting
from cairn.catalog import Paper, register
from cairn.data import datasets
from cairn.errors import CairnError
from cairn.evaluation.measure import evaluate
from cairn.statistics import spearman, wilson
from cairn.studies import library
from cairn.studies.conditions import Condition, at_most, judged, stated
from cairn.studies.study import Figures, Say, Study
from cairn.training.run import Run, train

STEPS = [2**k for k in range(3, 11)]
SWITCH = STEPS[-2]
"""Step at which one process becomes two."""


def recipe(seed: int) -> dict[str, Any]:
    """Byte-level LLaMA of 0.4M parameters on Shakespeare and the library's documentation; checkpoints in doublings."""
    return {
        "seed": seed,
        "model": {"name": "llama", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4},
        "data": {
            "tokenizer": "byte",
            "sources": {"shakespeare": {"corpus": "tiny-shakespeare"}, "docs": {"corpus": library.docs("8 MiB")}},
            "sequence_length": 128,
            "held_out": 0.1,
        },
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "schedule": {"name": "cosine", "warmup": "40 steps"},
        "training": {"tokens": f"{STEPS[-1]} steps", "batch": 16 * 128, "compile": False},
        "checkpoint": {"every": f"{STEPS[-1]} steps", "also": [f"{step} steps" for step in STEPS]},
        "callbacks": [{"name": "sample", "every": f"{SWITCH} steps", "prompts": ["The "], "new_tokens": 80}],
    }


@register("study", "trajectory", paper=Paper("Experience of Training a 1.7B-Parameter LLaMa Model From Scratch", card=1))
class Trajectory(Study):
    """Validation loss marks the stages of a run: word order is learned as it falls, and hardware may change on the way."""

    minutes: ClassVar[float] = 15
    published: ClassVar[str] = (
        "Validation-loss levels mark stages from incoherent to fluent text; adding a second GPU in mid-run does not harm the loss (sizes are not given)."
    )
    protocol: ClassVar[str] = (
        "A byte-level LLaMA of 0.4M parameters trains 1024 steps of 2048 tokens on tiny-shakespeare and python-docs, with 8 checkpoints whose token counts "
        "double. Each is measured on the same held-out windows, on 500 held-out sentences against themselves with two words swapped, and on BLiMP "
        "(50 pairs of each paradigm, reported with its interval). From step 512 a copy of the run goes on with two processes. Three seeds."
    )
    control: ClassVar[str] = (
        "Measurements are attributed to the wrong checkpoints (word order to the mirrored one, losses to their neighbours), "
        "and the two-process curve is shifted by one step."
    )

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        blimp = [{"name": "blimp", "pairs": 50}] if datasets.locate("blimp") else []
        whole = train(recipe(seed), work / "whole", stop_at_step=SWITCH)
        shutil.copytree(whole.path, work / "wider")
        for name, processes in (("whole", 1), ("wider", 2)):
            _resume_elsewhere(work / name, processes)
        rows = evaluate(work / "whole", ["held-out", "word-swap", *blimp])
        points = _points([vars(row) for row in rows])
        curves = {name: [row["loss"] for row in Run(work / name).metrics()] for name in ("whole", "wider")}
        if sabotage:
            points, curves = _sabotaged(points, curves)
        samples = [f"{s['step']}: {s['prompt']}{s['text']}" for s in Run(work / "whole").samples()]
        return {"points": points, "samples": samples, "hardware_gap": max(abs(a - b) for a, b in zip(*curves.values(), strict=True)), **_summary(points)}

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        falls, gaps = [run["falls"] for run in runs], [run["hardware_gap"] for run in runs]
        told = ", ".join(f"{times} times" for times in falls)
        return [
            stated("held-out loss falls from each checkpoint to the next", "strictly, 7 times", told, all(times == 7 for times in falls), main=True),
            judged("rank correlation of word order with loss", [run["correlation"] for run in runs], at_most(-0.7), main=True),
            stated(
                "loss curves of one and of two processes",
                "within 1e-3",
                ", ".join(f"{gap:.1e}" for gap in gaps),
                all(gap <= 1e-3 for gap in gaps),
                main=True,
                always=True,
            ),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        figure, axes = plotting.subplots(1, 3, figsize=(13, 3.6))
        for axis, key in zip(axes, ("loss", "word_swap", "blimp"), strict=True):
            for run in runs:
                points = [p for p in run["points"] if p.get(key) is not None]
                axis.plot([p["tokens"] for p in points], [p[key] for p in points], marker="o", label=f"seed {run['seed']}")
            axis.set(xscale="log", xlabel="tokens", title={"loss": "held-out loss", "word_swap": "word order right", "blimp": "BLiMP accuracy"}[key])
            axis.legend()
        plotting.save(figure, path)


def _resume_elsewhere(run: Path, processes: int) -> None:
    """Go on in processes of their own, as a user would on another machine; one computing thread each."""
    command = [sys.executable, "-m", "cairn", "resume", str(run), f"parallel.data={processes}", "--json"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CairnError(f"The run {run} did not go on with {processes} process(es): {done.stderr.strip().splitlines()[-1]}")


def _points(rows: list[dict[str, Any]]) -> list[Figures]:
    """One entry per checkpoint."""
    points: dict[int, Figures] = {}
    names = {
        ("held-out", "loss"): "loss",
        ("held-out", "bits_per_byte"): "bits_per_byte",
        ("word-swap", "accuracy"): "word_swap",
        ("blimp", "accuracy"): "blimp",
    }
    for row in rows:
        point = points.setdefault(row["tokens"], {"tokens": row["tokens"]})
        point[names[row["task"], row["metric"]]] = row["value"]
        if row["task"] == "blimp":
            point["blimp_interval"] = wilson(round(row["value"] * row["n"]), row["n"])
    return [points[tokens] for tokens in sorted(points)]


def _summary(points: list[Figures]) -> Figures:
    losses = [point["loss"] for point in points]
    return {
        "falls": sum(later < earlier for earlier, later in pairwise(losses)),
        "correlation": spearman(losses, [point["word_swap"] for point in points]),
    }


def _sabotaged(points: list[Figures], curves: dict[str, list[float]]) -> tuple[list[Figures], dict[str, list[float]]]:
    losses, swaps = [p["loss"] for p in points], [p["word_swap"] for p in points]
    losses[0::2], losses[1::2] = losses[1::2], losses[0::2]
    mixed = [p | {"loss": loss, "word_swap": swap} for p, loss, swap in zip(points, losses, reversed(swaps), strict=True)]
    return mixed, {"whole": curves["whole"], "wider": curves["wider"][1:] + curves["wider"][:1]}
