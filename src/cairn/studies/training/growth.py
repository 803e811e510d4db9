"""Stacking a small model against a deep one from scratch, at equal operations (card 49, proof b)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cairn import plotting
from cairn.catalog import Paper, register
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.format.read import open as opened
from cairn.evaluation.measure import evaluate
from cairn.growth.enlarge import grow
from cairn.models.families.llama import Llama
from cairn.studies import bases, library
from cairn.studies.conditions import Condition, above, below, judged, stated
from cairn.studies.study import Figures, Say, Study
from cairn.training.run import Run, fork, train

SMALL, DEEP, STEPS, BATCH, LENGTH = 2, 8, 360, 16 * 64, 64
GROWN_AT = {"5": 66, "16": 210, "40": 522}
"""Steps of the small model by about how many percent of the budget they cost."""
LEARNING = 20
"""Updates of LiGO's maps; each costs what a step of the deep model costs."""
ARMS = ("stack", "zero", "masked")


def recipe(seed: int, layers: int, steps: int) -> dict[str, Any]:
    """Byte-level LLaMA of width 64 on Python's library source, 30 steps of warm-up and a constant rate."""
    return {
        "seed": seed,
        "model": {"name": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": layers, "num_attention_heads": 4},
        "data": {"tokenizer": "byte", "sources": {"source": {"corpus": library.source("16 MiB")}}, "sequence_length": LENGTH},
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "schedule": {"name": "constant", "warmup": "30 steps"},
        "training": {"tokens": f"{steps} steps", "batch": BATCH, "compile": False},
        "checkpoint": {"every": f"{steps} steps", "first": True, "also": [f"{step} steps" for step in GROWN_AT.values() if step < steps]},
        "callbacks": [{"name": "evaluate", "every": "20 steps", "measurements": [{"name": "held-out", "sequences": 128}]}],
    }


@register(
    "study", "growth", paper=Paper("Stacking Your Transformers: A Closer Look at Model GrowthStudy for Efficient LLM Pre-Training", "arXiv:2405.15319", card=49)
)
class GrowthStudy(Study):
    """A stacked model reaches a lower loss than a deep one from scratch for the same operations, the small model's included."""

    minutes: ClassVar[float] = 15
    published: ClassVar[str] = (
        "Depthwise stacking needs 194B tokens for the loss that a 7B model from scratch reaches at 300B (54.6 % faster), and beats every other growth "
        "operator, function-preserving ones included; the loss jumps at the growth and recovers."
    )
    protocol: ClassVar[str] = (
        "Byte-level LLaMA of width 64, context 64, batch 16, python-source, AdamW at 3e-3 with 30 warm-up steps and then constant in every phase of every arm. "
        "Budget F: the matrix products (forward and backward, head and attention included) of 360 steps of 8 layers from scratch (the card's 600 would take "
        "longer than a study may). Grown arms: 2 layers for 210 steps (16 % of F), grown four times, a fresh AdamW with 30 warm-up steps, then 8 layers until "
        "F is spent, on what the small model has not read. Operators: stack, zero, masked (random new layers, the mask rises over 10 % of the run). Only for "
        "seed 0, without a condition: ligo (20 updates of the maps, counted), growth by stack after 66 and 522 steps (5 and 40 % of F), the small model "
        "alone up to F, and stack (after 522 steps) and scratch at 3 F. Validation: 128 held-out windows every 20 steps; the mean of the last two counts."
    )
    control: ClassVar[str] = "The small model that is stacked has not been trained, though its operations are counted: growth without what was learned."

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        if seed not in _honest:
            _honest[seed] = _arms(seed, work, say)
        if not sabotage:
            return _honest[seed]
        small = bases.run_of(recipe(seed, SMALL, _small_steps(seed)), say=say)
        spoilt = _grown("stack", {}, opened(small.checkpoints()[0]), GROWN_AT["16"], work / "untrained", STEPS)
        return _honest[seed] | {"curves": _honest[seed]["curves"] | {"stack": spoilt["curve"]}, "after": _honest[seed]["after"] | {"stack": spoilt["after"]}}

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        final = {name: [last(run["curves"][name]) for run in runs] for name in ("scratch", *ARMS)}
        reached = [100 * reach(run["curves"]["stack"], last(run["curves"]["scratch"])) for run in runs]
        jumps = [run["after"]["stack"] - run["small"] for run in runs]
        kept = max(abs(run["after"][name] - run["small"]) for run in runs for name in ("zero", "masked"))

        def behind(name: str) -> list[float]:
            return [other - stack for other, stack in zip(final[name], final["stack"], strict=True)]

        return [
            judged("loss at F: scratch minus stack", behind("scratch"), above(0.05), unit="nats", form=".4f", main=True),
            judged("scratch's last loss is reached by stack at", reached, below(80), unit="% of F", form=".0f", main=True),
            judged("loss right after the growth minus the small model's", jumps, above(0), unit="nats", form=".4f"),
            judged("loss at F: zero minus stack", behind("zero"), above(0), rule="mean", unit="nats", form=".4f", main=True),
            judged("loss at F: masked minus stack", behind("masked"), above(0), rule="mean", unit="nats", form=".4f", main=True),
            stated("zero and masked: change of the loss by the growth", "< 1e-4", f"{kept:.1e}", kept < 1e-4, always=True),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        figure, axes = plotting.subplots(1, 2, figsize=(10, 3.8), sharey=True)
        for axis, names in zip(axes, (["scratch", *ARMS], ["scratch", "stack at 5 %", "stack", "stack at 40 %", "ligo", "small alone"]), strict=True):
            for name in names:
                curves = [run["curves"][name] for run in (runs if axis is axes[0] else runs[:1])]
                axis.plot([share for share, _ in curves[0]], np.mean([[loss for _, loss in curve] for curve in curves], axis=0), label=name)
            axis.set(xlabel="share of the budget", ylim=(None, 2.6))
            axis.legend()
        axes[0].set_ylabel("held-out loss, nats per byte")
        axes[0].set_title("mean of the seeds")
        axes[1].set_title("seed 0")
        plotting.save(figure, path)


Curve = list[tuple[float, float]]
"""(share of the budget spent, held-out loss)."""

_honest: dict[int, Figures] = {}
"""Figures by seed, which the control shares but for the arm that it spoils."""


def last(curve: Curve) -> float:
    """The mean of the last two points, against the noise of one."""
    return float(np.mean([loss for _, loss in curve[-2:]]))


def reach(curve: Curve, loss: float) -> float:
    """The share of the budget at which a curve first lies at or below a loss; infinity if it never does."""
    return next((share for share, value in curve if value <= loss), float("inf"))


def _cost(layers: int) -> float:
    """Operations of one step."""
    sizes = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_hidden_layers": layers}
    return Llama.parse(sizes).flops_per_token(LENGTH) * BATCH


def _small_steps(seed: int) -> int:
    """Seed 0 trains the small model up to the whole budget."""
    return int(STEPS * _cost(DEEP) / _cost(SMALL)) if seed == 0 else GROWN_AT["16"]


def _curve(run: Run, spent: float, layers: int, since: int, budget: float) -> Curve:
    """Points of a run whose steps after `since` cost what `layers` cost, after `spent` operations before."""
    rows = [row for row in run.metrics() if "held-out/loss" in row]
    return [((spent + (row["step"] - since) * _cost(layers)) / budget, row["held-out/loss"]) for row in rows]


def _loss(checkpoint: Checkpoint) -> float:
    return next(row.value for row in evaluate(checkpoint, [{"name": "held-out", "sequences": 128}], store=False) if row.metric == "loss")


def _grown(method: str, options: dict[str, Any], small: Checkpoint, paid: int, folder: Path, steps: int) -> Figures:
    """The curve of a grown model until the operations of `steps` steps of the deep one are spent, `paid` steps of the small one counted."""
    large = grow(method, small, folder / "large", {"factor": DEEP // SMALL, **options})
    budget, step = steps * _cost(DEEP), small.step or 0
    spent = paid * _cost(SMALL) + options.get("steps", 0) * _cost(DEEP)
    more = int((budget - spent) / _cost(DEEP))
    settings = [
        "schedule.start=now",
        f"training.tokens={step + more} steps",
        "checkpoint.first=false",
        "checkpoint.also=[]",
        f"checkpoint.every={step + more} steps",
    ]
    run = fork(large, folder / "run", settings, fresh=["optimizer"])
    return {"curve": _curve(run, spent, DEEP, step, budget), "after": _loss(large)}


def _arms(seed: int, work: Path, say: Say) -> Figures:
    budget = STEPS * _cost(DEEP)
    scratch = bases.run_of(recipe(seed, DEEP, STEPS), say=say)
    alone = bases.run_of(recipe(seed, SMALL, _small_steps(seed)), say=say)
    at = {path.name: opened(path) for path in alone.checkpoints()}
    small = {share: at[name] for share, step in GROWN_AT.items() if (name := f"step-{step:08d}") in at}
    curves = {"scratch": _curve(scratch, 0, DEEP, 0, budget)} | ({"small alone": _curve(alone, 0, SMALL, 0, budget)} if seed == 0 else {})
    after = {}
    for name in ARMS:
        say(f"seed {seed}: {name}")
        found = _grown(name, {}, small["16"], GROWN_AT["16"], work / name, STEPS)
        curves[name], after[name] = found["curve"], found["after"]
    figures: Figures = {
        "small": _loss(small["16"]),
        "after": after,
        "curves": curves,
        "bases": bases.digests({"small": small["16"], "scratch": scratch.newest()}),
    }
    if seed == 0:
        say(f"seed {seed}: what is only reported")
        figures |= _reported(small, work, curves)
    return figures


def _reported(small: dict[str, Checkpoint], work: Path, curves: dict[str, Curve]) -> Figures:
    """Further arms of one seed, their curves put into `curves`."""
    curves["ligo"] = _grown("ligo", {"steps": LEARNING, "lr": 1e-2}, small["16"], GROWN_AT["16"], work / "ligo", STEPS)["curve"]
    for share in ("5", "40"):
        curves[f"stack at {share} %"] = _grown("stack", {}, small[share], GROWN_AT[share], work / f"stack-{share}", STEPS)["curve"]
    longer = _grown("stack", {}, small["40"], GROWN_AT["40"], work / "longer", 3 * STEPS)["curve"]
    whole = train(recipe(0, DEEP, 3 * STEPS), work / "whole")
    return {"three times the budget": {"stack": last(longer), "scratch": last(_curve(whole, 0, DEEP, 0, 3 * STEPS * _cost(DEEP)))}}
