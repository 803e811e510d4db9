"""Sparse pretraining, then dense fine-tuning, against staying sparse and staying dense (card 92, proof b)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from cairn import plotting
from cairn.catalog import Paper, register
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.format.read import open as opened
from cairn.data.text.feed import Samples
from cairn.data.text.tokenizer import byte_level
from cairn.evaluation.measure import evaluate
from cairn.studies import bases, library
from cairn.studies.conditions import Condition, above, judged, stated
from cairn.studies.study import Figures, Say, Study
from cairn.training import recipe as recipes
from cairn.training.sources import open_data
from cairn.training.sparsity import flops_per_token, kept, masked_shapes

STEPS, TUNING, BATCH, LENGTH = 300, 100, 8 * 128, 128
LEVELS = (0.0, 0.5, 0.75)
RATES = (1e-3, 3e-3)


@register("study", "sparse-pretraining", paper=Paper("SPDF: Sparse Pre-training and Dense Fine-tuning for Large Language Models", "arXiv:2303.10464", card=92))
class SparsePretraining(Study):
    """After sparse pretraining, fine-tuning all entries recovers what fine-tuning the sparse ones cannot."""

    minutes: ClassVar[float] = 7
    published: ClassVar[str] = (
        "GPT-3 XL (1.3B) pretrained with 75 % zeros takes 2.5 times fewer operations and after dense fine-tuning loses nothing significant "
        "downstream; dense fine-tuning recovers what sparse fine-tuning cannot."
    )
    protocol: ClassVar[str] = (
        "Byte-level LLaMA of 0.5M parameters (4 layers, width 96, context 128, batch 8), pretrained 300 steps at 3e-3 (cosine) on python-docs and "
        "tiny-shakespeare with 0, 50 and 75 % zeros in attention and MLP; then 100 steps on grade-school word problems (gsm8k, for the card's E2E), "
        "loss on the worked solutions alone, windows of 512 bytes (with 256 an update of seed 2 met no solution and the study stopped without a "
        "figure), with a fresh optimizer: dense to dense, sparse to dense, sparse to sparse, dense stopped at the "
        "operations of 75 % to dense, and from scratch. Every arm is tuned at 1e-3 and 3e-3 and the better one on one half of the held-out problems "
        "is reported on the other half. Three seeds; every condition in each."
    )
    control: ClassVar[str] = "The sparse model that is fine-tuned densely has not been pretrained: it has its mask and its first weights."

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        if not sabotage:
            return _arms(seed, say)
        begin = opened(bases.run_of(_recipe(seed, 0.75, 40) | {"checkpoint": {"every": "40 steps", "first": True}}, say=say).checkpoints()[0])
        losses = [_tuned(seed, lr, [], begin, say) for lr in RATES]
        return self.honest(seed) | {"tuned": self.honest(seed)["tuned"] | {"sparse to dense": min(losses)[1]}}

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        arms = ("dense to dense", "sparse to dense", "sparse to sparse", "scratch")
        dense, recovered, stayed, scratch = ([run["tuned"][arm] for run in runs] for arm in arms)
        gains = [b - a for a, b in zip(recovered, stayed, strict=True)]
        closed = [100 * gain / (b - c) for gain, b, c in zip(gains, stayed, dense, strict=True)]
        steps = [min(b - a for a, b in itertools.pairwise(run["pretrained"].values())) for run in runs]
        mattered = [b - a for a, b in zip(recovered, scratch, strict=True)]
        losses, alive = ["; ".join(", ".join(f"{value:.3f}" for value in run["pretrained"].values()) for run in runs), sum(run["alive"] for run in runs)]
        return [
            judged("75 %: sparse to sparse minus sparse to dense", gains, above(0.01), unit="nats", form=".4f", main=True),
            judged("share of the gap to dense that dense fine-tuning closes", closed, above(30), unit="%", form=".0f", main=True),
            judged("smallest rise of the pretraining loss from 0 to 50 to 75 % zeros", steps, above(0), unit="nats", found=losses),
            judged("from scratch minus sparse to dense", mattered, above(0.1), unit="nats", form=".4f", main=True),
            stated("entries outside a mask after pretraining", "all exactly 0", str(alive), not alive, always=True),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        figure, axis = plotting.subplots(figsize=(7, 3.6))
        names = list(runs[0]["tuned"])
        values = np.array([[run["tuned"][name] for name in names] for run in runs])
        axis.bar(range(len(names)), values.mean(0), yerr=values.std(0), capsize=4)
        axis.set_xticks(range(len(names)), [name.replace(" to ", "\nto ") for name in names])
        axis.set(ylabel="loss of the solutions, nats per byte", ylim=(values.min() - 0.1, None))
        plotting.save(figure, path)


def _recipe(seed: int, level: float, steps: int = STEPS) -> dict[str, Any]:
    sources = {"docs": {"corpus": library.docs("8 MiB")}, "plays": {"corpus": "tiny-shakespeare"}}
    return {
        "seed": seed,
        "model": {"name": "llama", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
        "data": {"tokenizer": "byte", "sources": sources, "sequence_length": LENGTH, "held_out": 0.05},
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "schedule": {"name": "cosine", "warmup": "30 steps", "final": 0.1},
        "training": {"tokens": f"{steps} steps", "batch": BATCH, "compile": False},
        "checkpoint": {"every": f"{steps} steps"},
        "callbacks": [{"name": "sparse", "sparsity": level}] if level else [],
    }


def _tuning(seed: int, lr: float, callbacks: list[dict[str, Any]]) -> dict[str, Any]:
    tokenizer = byte_level()
    answers = {"name": "compatible", "marker": tokenizer.encode("\n"), "end": [tokenizer.eos_id]}
    return _recipe(seed, 0.0, TUNING) | {
        "data": {"tokenizer": "byte", "sources": {"problems": {"corpus": "gsm8k"}}, "sequence_length": 4 * LENGTH, "packing": "whole", "held_out": 0.1},
        "objective": answers,
        "optimizer": {"name": "adamw", "lr": lr},
        "schedule": {"name": "cosine", "warmup": "10 steps", "final": 0.1},
        "callbacks": callbacks,
    }


def _arms(seed: int, say: Say) -> Figures:
    pretrained = {level: bases.trained(_recipe(seed, level), say=say) for level in LEVELS}
    equal = bases.trained(_recipe(seed, 0.0, _affordable()), say=say)
    masks = [{"name": "sparse", "sparsity": 0.75}]
    starts: dict[str, tuple[Checkpoint | None, list[dict[str, Any]]]] = {
        "dense to dense": (pretrained[0.0], []),
        "sparse to dense": (pretrained[0.75], []),
        "sparse to sparse": (pretrained[0.75], masks),
        "fewer steps to dense": (equal, []),
        "scratch": (None, []),
    }
    tuned, chosen = {}, {}
    for name, (start, callbacks) in starts.items():
        say(f"seed {seed}: {name}")
        losses = {lr: _tuned(seed, lr, callbacks, start, say) for lr in RATES}
        chosen[name] = min(losses, key=lambda lr: losses[lr][0])
        tuned[name] = losses[chosen[name]][1]
    loss = {f"{level:g}": _held_out(checkpoint) for level, checkpoint in pretrained.items()}
    return {
        "pretrained": loss,
        "tuned": tuned,
        "rates": chosen,
        "alive": _alive(pretrained[0.75]),
        "bases": bases.digests({f"{k:g}": v for k, v in pretrained.items()}),
    }


def _affordable() -> int:
    """Steps of the dense model that cost what the pretraining with 75 % zeros does."""
    model = recipes.load(_recipe(0, 0.0) | {"model": _recipe(0, 0.0)["model"] | {"vocab_size": 257}}).model
    dense, sparse = flops_per_token(model, LENGTH, kept(masked_shapes(model), 0.75))
    return round(STEPS * sparse / dense)


def _tuned(seed: int, lr: float, callbacks: list[dict[str, Any]], start: Checkpoint | None, say: Say) -> tuple[float, float]:
    """Loss of the solutions on the half that chooses and on the half that reports."""
    recipe = _tuning(seed, lr, callbacks)
    run = bases.run_of(recipe, say=say) if start is None else bases.stage_of(recipe, start.path, say=say)
    return _solution_losses(run.newest(), recipe)


def _solution_losses(checkpoint: Checkpoint, recipe: dict[str, Any]) -> tuple[float, float]:
    parsed = recipes.load(recipe)
    _, feed = open_data(parsed.data, 0, checkpoint.tokenizer)
    samples, model = feed.held_out(128), checkpoint.model()
    sums = np.array([_answer_loss(model, parsed.objective, _row(samples, row)) for row in range(len(samples.tokens))])
    halves = sums[::2].sum(0), sums[1::2].sum(0)
    return float(halves[0][0] / halves[0][1]), float(halves[1][0] / halves[1][1])


def _row(samples: Samples, row: int) -> Samples:
    documents = None if samples.documents is None else samples.documents[row : row + 1]
    return Samples(samples.tokens[row : row + 1], documents, samples.weights[row : row + 1], samples.source[row : row + 1], samples.window[row : row + 1])


def _answer_loss(model: torch.nn.Module, objective: Any, samples: Samples) -> tuple[float, float]:
    arrays = objective.arrays(samples)
    with torch.no_grad():
        total = objective.loss(model, {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}).total
    return float(total), float(arrays["weights"].sum())


def _held_out(checkpoint: Checkpoint) -> float:
    return next(row.value for row in evaluate(checkpoint, [{"name": "held-out", "sequences": 128}], store=False) if row.metric == "loss")


def _alive(checkpoint: Checkpoint) -> int:
    """Weights that are not zero though their mask is."""
    masks: Mapping[str, Any] = opened(checkpoint.path).ingredients or {}
    return sum(int((checkpoint.tensors[name.removeprefix("sparse/")].load()[~mask.load()] != 0).sum()) for name, mask in masks.items())
