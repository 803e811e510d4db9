"""What a resume without the optimizer's state costs, and what a restarted schedule costs (card 01, proof b)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from cairn import plotting
from cairn.catalog import Paper, register
from cairn.studies import library
from cairn.studies.conditions import Condition, above, at_least, judged, stated
from cairn.studies.study import Figures, Say, Study
from cairn.training.run import Run, fork, resume, train

BASE, MORE = 600, 80
MEASURE = "callbacks=[{name: evaluate, every: 5 steps, measurements: [{name: held-out, sequences: 128}]}]"
ARMS = {
    "fresh": {"fresh": ["optimizer"], "overrides": []},
    "rewarmed": {"fresh": ["optimizer"], "overrides": ["schedule.rewarm=30 steps"]},
    "restarted": {"fresh": [], "overrides": ["schedule.start=now"]},
}


def recipe(seed: int) -> dict[str, Any]:
    """Byte-level LLaMA of 3 layers and width 64 on Python's library source; 680 steps, cosine to a tenth at the end."""
    return {
        "seed": seed,
        "model": {"name": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4},
        "data": {"tokenizer": "byte", "sources": {"source": {"corpus": library.source("16 MiB")}}, "sequence_length": 64},
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "schedule": {"name": "cosine", "warmup": "40 steps", "final": 0.1},
        "training": {"tokens": f"{BASE + MORE} steps", "batch": 16 * 64, "compile": False},
        "checkpoint": {"every": f"{BASE} steps"},
    }


@register("study", "resume-jump", paper=Paper("Experience of Training a 1.7B-Parameter LLaMa Model From Scratch", card=1))
class ResumeJump(Study):
    """Resuming without the optimizer's state makes the loss jump; restoring everything changes nothing at all."""

    minutes: ClassVar[float] = 8
    published: ClassVar[str] = "Resuming without optimizer state raises the training loss; restoring it avoids that (no size is given)."
    protocol: ClassVar[str] = (
        "A byte-level LLaMA (3 layers, width 64, context 64, batch 16, lr 3e-3, 40 warm-up steps, cosine to a tenth at step 680) trains 600 steps on "
        "python-source, then 80 more on the same batches: (i) full state, (ii) fresh AdamW, (iii) fresh AdamW with a 30-step re-warm-up, "
        "(iv) full state with the schedule restarted from step 0. Excess is arm minus (i). Three seeds; every condition must hold in each."
    )
    control: ClassVar[str] = "Treatments are swapped: arm (i) loses its optimizer state, arms (ii) to (iv) keep full state and schedule."

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        whole = train(recipe(seed), work / "whole", [MEASURE])
        base = train(recipe(seed), work / "base", stop_at_step=BASE)
        shutil.copytree(base.path, work / "full")
        curves = {"whole": _curve(whole), "full": _curve(resume(work / "full", [MEASURE], fresh=["optimizer"] if sabotage else []))}
        for name, arm in ARMS.items():
            changes = {"fresh": [], "overrides": []} if sabotage else arm
            curves[name] = _curve(fork(base.path, work / name, [*changes["overrides"], MEASURE], fresh=changes["fresh"]))  # type: ignore[arg-type]
        return {"curves": curves, **_summary(curves)}

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        def each(key: str) -> list[float]:
            return [run[key] for run in runs]

        same = [run["identical"] for run in runs]
        rewarmed = [run["fresh_excess"] / 3 - run["rewarmed_excess"] for run in runs]
        return [
            stated("(i) full state is bit-identical to no interruption", "80 equal losses", ", ".join(map(str, same)), all(same), main=True, always=True),
            judged("(ii) largest excess of training loss in 20 steps", each("fresh_excess"), above(0.02), unit="nats", form=".4f", main=True),
            judged("(ii) held-out loss 5 steps after the resume, excess", each("fresh_held_out_5"), above(0.01), unit="nats", form=".4f", main=True),
            judged("(iii) a third of the excess of (ii) minus the largest excess, re-warmed", rewarmed, at_least(0), unit="nats", form=".4f"),
            judged("(iv) held-out loss 80 steps after, excess", each("restarted_held_out_80"), above(0.05), unit="nats", form=".4f"),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        figure, axes = plotting.subplots(1, len(runs), figsize=(4.5 * len(runs), 3.4), squeeze=False)
        for axis, run in zip(axes[0], runs, strict=True):
            full = run["curves"]["full"]["loss"]
            for name in ARMS:
                axis.plot([a - b for a, b in zip(run["curves"][name]["loss"], full, strict=True)], label=name)
            axis.axhline(0, color="grey", linewidth=1)
            axis.set(xlabel="steps after the resume", ylabel="training loss minus (i), nats", title=f"seed {run['seed']}")
            axis.legend()
        plotting.save(figure, path)


def _curve(run: Run) -> dict[str, Any]:
    """Losses of the last 80 steps, and held-out losses by steps after the resume."""
    rows = [row for row in run.metrics() if row["step"] > BASE]
    return {"loss": [row["loss"] for row in rows], "held_out": {str(r["step"] - BASE): r["held-out/loss"] for r in rows if "held-out/loss" in r}}


def _summary(curves: dict[str, dict[str, Any]]) -> Figures:
    full = curves["full"]

    def excess(name: str) -> float:
        return max(a - b for a, b in zip(curves[name]["loss"][:20], full["loss"][:20], strict=True))

    def worse(name: str, steps: int) -> float:
        return curves[name]["held_out"][str(steps)] - full["held_out"][str(steps)]

    return {
        "identical": curves["whole"]["loss"] == full["loss"],
        "fresh_excess": excess("fresh"),
        "fresh_held_out_5": worse("fresh", 5),
        "fresh_held_out_80": worse("fresh", 80),
        "rewarmed_excess": excess("rewarmed"),
        "restarted_held_out_80": worse("restarted", 80),
    }
