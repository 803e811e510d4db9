"""Three architectures by two objectives, with and without multitask fine-tuning, and the way from one cell to another (card 14)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cairn import plotting
from cairn.catalog import Paper, register
from cairn.checkpoint.format import read
from cairn.checkpoint.format.read import Checkpoint
from cairn.data import datasets
from cairn.evaluation import measure
from cairn.models.families.llama import Llama
from cairn.models.families.t5 import T5
from cairn.options import configure
from cairn.randomness import seed_for, uniform
from cairn.studies import library
from cairn.studies.bases import digests, forked, run_of, text_file
from cairn.studies.conditions import Condition, above, below, judged, stated
from cairn.studies.study import Figures, Say, Study
from cairn.training.estimate import flops_per_unit, matched
from cairn.training.run import Run
from cairn.training.sources import open_data

LENGTH, BATCH, STEPS, ADAPTED, TUNED = 128, 1024, 400, 240, 80
"""Tokens of a sequence and of an update; updates of a cell, of an adaptation, and of fine-tuning."""
START = STEPS * 7 // 10
EVERY = STEPS // 10
MLM = {"name": "span-corruption", "rate": 0.15, "span": 3}
CELLS = {
    "CD:LM": ("causal", "causal-lm"),
    "CD:MLM": ("causal", MLM),
    "ND:LM": ("prefix", "prefix-lm"),
    "ND:MLM": ("prefix", MLM),
    "ED:LM": ("cross", "prefix-lm"),
    "ED:MLM": ("cross", MLM),
}
DECODER = {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 384, "tie_word_embeddings": True}
PAIR = {"d_model": 48, "d_kv": 12, "d_ff": 128, "num_layers": 3, "num_heads": 4, "vocab_size": 384, "feed_forward_proj": "gated-silu"}
TASKS_SHOWN, TASK_EXAMPLES, LONGEST = 11, 200, 110


def model(attention: str) -> dict[str, Any]:
    """A cell's network: one stack, or two of the same width and depth whose MLPs are narrowed by what cross-attention costs."""
    if attention != "cross":
        return {"name": "llama", **DECODER, "attention": attention}
    inputs, targets = configure("objective", MLM).sizes(LENGTH)
    flops = Llama(**DECODER).matmul_flops(inputs + targets, causal=False)
    return {"name": "t5", **PAIR, "d_ff": matched(T5(**PAIR), inputs, targets, flops).d_ff}


def recipe(seed: int, cell: str) -> dict[str, Any]:
    """A cell of about 0.1M parameters for each stack, byte by byte."""
    attention, objective = CELLS[cell]
    sources = {
        "docs": {"corpus": library.docs("4 MiB"), "weight": 2},
        "plays": {"corpus": {"name": "dataset", "dataset": "tiny-shakespeare"}},
    }
    return {
        "seed": seed,
        "model": model(attention),
        "data": {"tokenizer": "byte", "sources": sources, "sequence_length": LENGTH, "held_out": 0.05},
        "objective": objective,
        "optimizer": {"name": "adamw", "lr": 6e-3},
        "schedule": {"name": "inverse-square-root", "warmup": "5%", "hold": "20%"},
        "training": {"tokens": f"{STEPS} steps", "batch": BATCH, "compile": False},
        "checkpoint": {"every": f"{EVERY} steps", "first": True},
    }


def tuning(seed: int, cell: str, corpus: Path) -> dict[str, Any]:
    """Fine-tuning on prompts and answers: the prompt is read (in both directions where the cell does), the answer is said."""
    data = {"sources": {"tasks": {"corpus": str(corpus)}}, "sequence_length": LENGTH, "packing": "whole", "held_out": 0.0}
    return {
        **recipe(seed, cell),
        "data": data,
        "objective": {"name": "prefix-lm", "split": "marker", "marker": "\nOutput:"},
        "optimizer": {"name": "adamw", "lr": 2e-3},
        "schedule": {"name": "constant"},
        "training": {"tokens": f"{TUNED} steps", "batch": BATCH, "compile": False},
        "checkpoint": {"every": "100%"},
    }


@register(
    "study",
    "architecture-objective",
    paper=Paper("What Language Model Architecture and Pretraining Objective Work Best for Zero-Shot Generalization?", "arXiv:2204.05832", card=14),
)
class ArchitectureObjective(Study):
    """Causal decoders trained to predict what follows are best without fine-tuning, and go on as anything else cheaply."""

    minutes: ClassVar[float] = 10
    published: ClassVar[str] = (
        "After pretraining alone a causal decoder with full language modelling is best at zero-shot; cells of masked language modelling are near chance. "
        "After multitask fine-tuning masked cells win. Going on from a causal language model as a non-causal masked one is about 3.3 times as fast as "
        "training the latter anew (5B decoders, 11B encoder-decoders, 168B tokens of C4)."
    )
    protocol: ClassVar[str] = (
        "Six cells, {causal decoder, prefix decoder, encoder-decoder} x {language modelling, span corruption 0.15/3}, byte by byte on Python's documentation "
        "and Shakespeare, 400 updates of 1024 processed tokens (0.4M, where the card has 0.8M), sequences of 128. Decoders are LLaMA blocks (3 layers, 48 "
        "wide, 0.1M parameters), the encoder-decoder T5 blocks of the same width, depth and activation, with the MLP at which span corruption costs the same. "
        "Language modelling of prefix decoder and encoder-decoder splits each window anywhere; the encoder-decoder's rows are padded for it, as in the paper, "
        "and cost twice. One optimizer, rate and schedule (inverse square root) for all, fixed before the first run that counts (tried on seed 99). Losses "
        "count only what is said, which is reported beside what is processed. Probes are sums of log-probabilities of whole sentences behind an end-of-text: "
        "500 held-out sentences against themselves with two words swapped; loss on held-out windows; BLiMP, 5 pairs of each paradigm. Fine-tuning: 80 updates "
        "on 11 of 22 tasks of instruction-induction, since too few items of Alpaca fit the window; ranking is measured on the other 11. Adaptation: the "
        "causal language model at 70 % of its tokens goes on, weights and moments kept, as a prefix decoder under span corruption. Whether fine-tuning turns "
        "the order is recorded and decides nothing. Three seeds."
    )
    control: ClassVar[str] = (
        "The causal language model is replaced by the causal decoder trained on spans, and what is adapted is its checkpoint before the first update."
    )

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        runs = {cell: run_of(recipe(seed, cell), say=say) for cell in CELLS}
        start = read.open(runs["CD:LM"].checkpoints()[0 if sabotage else START // EVERY])
        if sabotage:
            runs["CD:LM"] = runs["CD:MLM"]
        shown, unseen = _tasks(seed)
        corpus = text_file(_examples(shown, seed))
        found: Figures = {"cells": {}, "bases": digests({cell: run.newest() for cell, run in runs.items()})}
        for cell, run in runs.items():
            tuned = run_of(tuning(seed, cell if cell != "CD:LM" or not sabotage else "CD:MLM", corpus), parent=run.newest(), say=say)
            found["cells"][cell] = _figures(run, tuned, unseen)
        return found | _adaptation(start, runs["ND:MLM"], say)

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        cells = [run["cells"] for run in runs]
        masked, language = [c for c in CELLS if c.endswith("MLM")], ["ND:LM", "ED:LM"]
        swap = [{c: figures[c]["word_swap"] for c in CELLS} for figures in cells]
        best = [max(s[c] for c in masked) for s in swap]
        leads = [min(s["CD:LM"] - 0.6, s["CD:LM"] - b - 0.05) for s, b in zip(swap, best, strict=True)]
        error = 2 * (0.25 / 500) ** 0.5
        between = [[best_masked - error <= s[c] <= s["CD:LM"] + error for c in language] for s, best_masked in zip(swap, best, strict=True)]
        gaps = [min(f[c]["sentence_loss"] for c in masked) - f["CD:LM"]["sentence_loss"] for f in cells]
        ahead = [run["scratch"][str(ADAPTED // 2)] - run["adapted"][str(ADAPTED // 2)] for run in runs]
        shares = [_share(run) for run in runs]
        costs = max(max(f[c]["flops_per_token"] for c in masked) / min(f[c]["flops_per_token"] for c in masked) for f in cells)
        altered = sum(run["altered"] for run in runs)
        return [
            judged(
                "CD:LM tells sentences from swapped ones: how far above 0.60, and 0.05 above the best MLM cell",
                leads,
                above(0),
                found="; ".join(f"{s['CD:LM']:.3f} against {b:.3f}" for s, b in zip(swap, best, strict=True)),
                main=True,
            ),
            stated(
                "ND:LM and ED:LM lie between",
                f"no worse than the best MLM cell and no better than CD:LM, within {error:.3f} (two standard errors), in every seed",
                "; ".join(", ".join(f"{c} {s[c]:.3f}" for c in language) for s in swap),
                all(all(each) for each in between),
                main=True,
            ),
            judged("loss on whole windows: best MLM cell minus CD:LM", gaps, above(0.3), unit="nats per byte", form=".2f", main=True),
            judged(f"span loss, ND:MLM from scratch minus adapted, at {ADAPTED // 2} updates each", ahead, above(0.1), unit="nats", form=".2f", main=True),
            judged(
                "share of scratch's tokens after which the adapted one has its last loss",
                [math.inf if share is None else share for share in shares],
                below(0.6),
                rule=2,
                found=", ".join("not reached" if share is None else f"{share:.2f}" for share in shares),
                main=True,
            ),
            stated("weights that the change of cell alters", "none", str(altered), not altered, always=True),
            stated("cost per token, dearest over cheapest MLM cell", "<= 1.05", f"{costs:.3f}", costs <= 1.05, always=True),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        figure, axes = plotting.subplots(1, 3, figsize=(13, 3.8))
        for axis, key, title in ((axes[0], "word_swap", "sentence against swapped words"), (axes[1], "ranking_tuned", "unseen tasks after fine-tuning")):
            for number, run in enumerate(runs):
                axis.bar(np.arange(len(CELLS)) + 0.27 * (number - 1), [run["cells"][c][key] for c in CELLS], 0.25, color=f"C{number}")
            axis.set_xticks(range(len(CELLS)), list(CELLS), fontsize=8)
            axis.set(title=title, ylabel="accuracy")
        axes[0].axhline(0.5, color="grey", linewidth=0.8)
        for number, run in enumerate(runs):
            for name, style in (("scratch", "--"), ("adapted", "-")):
                steps = sorted(map(int, run[name]))
                label = {"scratch": "from scratch", "adapted": "from a causal language model"}[name] if not number else None
                axes[2].plot(steps, [run[name][str(step)] for step in steps], style, color=f"C{number}", label=label)
        axes[2].set(title="ND:MLM", xlabel="updates under span corruption", ylabel="nats per target", ylim=(None, 4))
        axes[2].legend(fontsize=8)
        plotting.save(figure, path)


def _figures(run: Run, tuned: Run, unseen: list[str]) -> Figures:
    """What one cell costs, says of whole sentences, and ranks before and after fine-tuning."""
    checkpoint, parsed = run.newest(), run.recipe
    tasks = [{"name": "word-swap"}, {"name": "held-out", "sequences": 128}, {"name": "blimp", "pairs": 5}, _spans()]
    ranking = {"name": "instruction-induction", "tasks": unseen, "examples": 0, "inputs": 20}
    scores = {f"{row.task}/{row.metric}": row for row in measure.evaluate(checkpoint, [*tasks, ranking])}
    after = {f"{row.task}/{row.metric}": row for row in measure.evaluate(tuned.newest(), [ranking])}
    return {
        "parameters": parsed.model.parameter_count(),
        "flops_per_token": flops_per_unit(parsed),
        "processed_tokens": parsed.total_units,
        "loss_tokens": _loss_tokens(run),
        "word_swap": scores["word-swap/accuracy"].value,
        "sentence_loss": scores["held-out/loss"].value,
        "blimp": [scores["blimp/accuracy"].value, scores["blimp/accuracy"].stderr],
        "span_loss": scores["spans/loss"].value,
        "ranking": scores["instruction-induction/accuracy"].value,
        "ranking_tuned": after["instruction-induction/accuracy"].value,
        "ranking_stderr": after["instruction-induction/accuracy"].stderr,
        "ranking_chance": after["instruction-induction/accuracy"].chance,
    }


def _loss_tokens(run: Run) -> int:
    """About how many of the processed tokens a run has learned to say, from its first 256 sequences."""
    parsed = run.recipe
    _, feed = open_data(parsed.data, parsed.seed, run.newest().tokenizer)
    return round(float(parsed.objective.arrays(feed.samples(np.arange(256)))["weights"].sum()) / 256 * parsed.total_units / LENGTH)


def _spans() -> dict[str, Any]:
    return {"name": "held-out-objective", "objective": MLM, "sequences": 128, "task": "spans"}


def _adaptation(start: Checkpoint, scratch: Run, say: Say) -> Figures:
    """Losses by updates under span corruption, from `start` and from scratch, and how many weights the change of cell alters (none)."""
    step = start.step or 0
    there = ["model.attention=prefix", f"objective={json.dumps(MLM)}", f"checkpoint.every={EVERY} steps", "checkpoint.first=false"]
    changed = forked(start, [*there, f"training.tokens={max(step, 1)} steps"], say=say).checkpoints()[0] if step else None
    run = forked(start, [*there, f"training.tokens={step + ADAPTED} steps"], say=say)
    after = read.open(changed).tensors if changed is not None else start.tensors
    return {
        "altered": sum(start.tensors[name].load().numpy().tobytes() != after[name].load().numpy().tobytes() for name in start.tensors),
        "adapted": {str((c.step or 0) - step): _span_loss(c) for c in map(read.open, run.checkpoints())},
        "scratch": {str(c.step): _span_loss(c) for c in map(read.open, scratch.checkpoints()[1:])},
    }


def _span_loss(checkpoint: Checkpoint) -> float:
    return next(row.value for row in measure.evaluate(checkpoint, [_spans()]) if row.metric == "loss")


def _share(run: Figures) -> float | None:
    """After which share of the updates of the run from scratch the adapted one has reached its last loss."""
    last = run["scratch"][str(STEPS)]
    reached = [int(step) for step, loss in run["adapted"].items() if loss <= last]
    return min(reached) / STEPS if reached else None


def _tasks(seed: int) -> tuple[list[str], list[str]]:
    """Tasks that are trained on, and the others."""
    folder = datasets.find("instruction-induction") / "execute"
    names = sorted(path.stem for path in folder.glob("*.json") if path.stem not in ("cause_and_effect", "common_concept"))
    order = [names[i] for i in np.argsort(uniform(seed_for(seed, "tasks"), np.arange(len(names))), kind="stable")]
    return sorted(order[:TASKS_SHOWN]), sorted(order[TASKS_SHOWN:])


def _examples(tasks: list[str], seed: int) -> list[str]:
    """Prompts and answers in the form in which they are asked for, as many of each task."""
    found = []
    for task in tasks:
        document = json.loads((datasets.find("instruction-induction") / "induce" / f"{task}.json").read_text(encoding="utf-8"))
        pairs = [(row["input"], row["output"][0] if isinstance(row["output"], list) else row["output"]) for row in document["examples"].values()]
        texts = [text for text in (f"Input: {given}\nOutput: {answer}" for given, answer in pairs) if len(text.encode()) <= LONGEST]
        order = np.argsort(uniform(seed_for(seed, "examples", task), np.arange(len(texts))), kind="stable")[:TASK_EXAMPLES]
        found += [texts[i] for i in order]
    return found
