"""A mixture of denoisers against its parts: no task is its worst, and its modes can be switched (card 5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cairn import plotting
from cairn.catalog import Paper, register
from cairn.checkpoint.format.read import Checkpoint
from cairn.data.text.denoising import Denoiser
from cairn.evaluation import measure
from cairn.options import configure
from cairn.studies import library
from cairn.studies.bases import digests, run_of
from cairn.studies.conditions import Condition, above, between, judged, stated
from cairn.studies.study import Figures, Say, Study
from cairn.training.objectives import Setting

LENGTH, BATCH, STEPS = 128, 1024, 400
ALL_BUT_ONE = 1 - 0.5 / LENGTH
"""The share that leaves a prefix of one token: plain language modelling."""
CAUSAL, SPANS = {"span": None, "split": "fixed", "rate": ALL_BUT_ONE}, {"span": 3, "rate": 0.15}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "causal": ("causal", {"denoisers": [CAUSAL]}),
    "spans": ("prefix", {"denoisers": [SPANS]}),
    "mixture": ("prefix", {}),
    "without modes": ("prefix", {"mode_tokens": False}),
}
PROBES: dict[str, tuple[str, dict[str, Any]]] = {
    "left to right": ("[S2S]", CAUSAL),
    "short spans": ("[NLU]", SPANS),
    "long spans": ("[NLG]", {"span": 64, "rate": 0.15}),
    "continuation": ("[S2S]", {"span": None, "split": "fixed", "rate": 0.25}),
}
"""Mode and denoiser of each probe; only the mixture is told the mode."""


def recipe(seed: int, arm: str) -> dict[str, Any]:
    """A byte-level LLaMA of 0.2M parameters under one objective."""
    attention, objective = ARMS[arm]
    sources = {
        "docs": {"corpus": library.docs("4 MiB"), "weight": 2},
        "plays": {"corpus": {"name": "dataset", "dataset": "tiny-shakespeare"}},
    }
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 384, "tie_word_embeddings": True}
    return {
        "seed": seed,
        "model": {"name": "llama", **sizes, "attention": attention},
        "data": {"tokenizer": "byte", "sources": sources, "sequence_length": LENGTH, "held_out": 0.05},
        "objective": {"name": "ul2", **objective},
        "optimizer": {"name": "adamw", "lr": 6e-3},
        "schedule": {"name": "inverse-square-root", "warmup": "5%", "hold": "20%"},
        "training": {"tokens": f"{STEPS} steps", "batch": BATCH, "compile": False},
        "checkpoint": {"every": "100%"},
    }


@register("study", "ul2", paper=Paper("UL2: Unifying Language Learning Paradigms", "arXiv:2205.05131", card=5))
class UL2Study(Study):
    """A mixture of denoisers is never the worst of three objectives, and the mode in front decides how it fills in."""

    minutes: ClassVar[float] = 8
    published: ClassVar[str] = (
        "UL2 beats T5-like and GPT-like pretraining in 9 of 9 ablation settings (about +43.6 % and +76.1 % relative); the mode token changes one-shot results "
        "by large factors between best and worst mode."
    )
    protocol: ClassVar[str] = (
        "Byte-level LLaMAs of 0.2M parameters (the card has 0.5 to 0.8M) on Python's documentation and Shakespeare, 400 updates of 1024 processed tokens "
        "(0.4M, where the card has 1.5M), inputs and targets together in sequences of 128, so that every denoiser costs the same. Arms: language modelling "
        "alone, read causally; span corruption 0.15/3 alone and UL2's seven denoisers with their modes, both read as prefix decoders; and the seven without "
        "modes. One rate and schedule (inverse square root) for all, fixed before the first run that counts (tried on seed 99). Four probes on 256 held-out "
        "windows, in bits per byte of the bytes that are asked for, what it costs to say where a span ends included: the window left to right, spans of 3 "
        "(0.15), spans of 64 (0.15), and the last quarter behind the rest; the mixture is told the mode that fits. Mode switching: spans of 3 behind [NLU] "
        "and behind [S2S]. Three seeds."
    )
    control: ClassVar[str] = "The mixture is replaced by its first denoiser alone, and for mode switching by the mixture that never saw a mode."

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        last = {arm: run_of(recipe(seed, arm), say=say).newest() for arm in ARMS}
        mixture, told = (last["spans"], False) if sabotage else (last["mixture"], True)
        arms = {"causal": (last["causal"], False), "spans": (last["spans"], False), "mixture": (mixture, told)}
        bits = {arm: {probe: _bits(checkpoint, probe, told) for probe in PROBES} for arm, (checkpoint, told) in arms.items()}
        switched = {"mixture": last["without modes" if sabotage else "mixture"], "without modes": last["without modes"]}
        return {
            "bits": bits,
            "modes": {arm: {mode: _bits(checkpoint, "short spans", True, mode) for mode in ("[NLU]", "[S2S]")} for arm, checkpoint in switched.items()},
            "differences": _differences(last["spans"]),
            "bases": digests(last),
        }

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        worst = [_worst_ranks(run["bits"]) for run in runs]
        continuation = [run["bits"]["spans"]["continuation"] - run["bits"]["mixture"]["continuation"] for run in runs]
        infill = [run["bits"]["causal"]["short spans"] - run["bits"]["mixture"]["short spans"] for run in runs]
        gaps = {arm: [run["modes"][arm]["[S2S]"] - run["modes"][arm]["[NLU]"] for run in runs] for arm in ("mixture", "without modes")}
        differences, bits = sum(run["differences"] for run in runs), "bits per byte"
        return [
            stated(
                "worst rank over the four probes",
                "mixture's is the best of the three arms', in every seed",
                "; ".join(", ".join(f"{arm} {rank}" for arm, rank in each.items()) for each in worst),
                all(each["mixture"] < min(each["causal"], each["spans"]) for each in worst),
                main=True,
            ),
            judged("continuation: span corruption alone minus mixture", continuation, above(0.05), unit=bits, form=".2f", main=True),
            judged("short spans: language modelling alone minus mixture", infill, above(0.05), unit=bits, form=".2f", main=True),
            judged("short spans: wrong mode minus right mode", gaps["mixture"], above(0.01), unit=bits, main=True),
            judged("the same where no mode was seen in training", gaps["without modes"], between(-0.01, 0.01), unit=bits),
            stated(
                "a mixture of the one denoiser 0.15/3 and span corruption",
                "ask the same of every token",
                f"{differences} differences",
                not differences,
                always=True,
            ),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        figure, axis = plotting.subplots(figsize=(8, 3.8))
        arms = list(runs[0]["bits"])
        for place, arm in enumerate(arms):
            for run in runs:
                x = np.arange(len(PROBES)) + 0.25 * (place - 1) + 0.05 * (run["seed"] - 1)
                label = arm if run is runs[0] else None
                axis.plot(x, [min(run["bits"][arm][probe], 8) for probe in PROBES], "o", color=f"C{place}", markersize=4, label=label)
        axis.set_xticks(range(len(PROBES)), list(PROBES))
        axis.set(ylabel="bits per byte (8 and more drawn at 8)")
        axis.legend(fontsize=8)
        plotting.save(figure, path)


def _bits(checkpoint: Checkpoint, probe: str, told: bool, mode: str | None = None) -> float:
    """Bits per byte of a probe; `told` puts its mode, or another one, in front."""
    own, row = PROBES[probe]
    objective = {"name": "ul2", "denoisers": [{**row, "mode": (mode or own) if told else None}]}
    rows = measure.evaluate(checkpoint, [{"name": "held-out-objective", "objective": objective}])
    return next(found.value for found in rows if found.metric == "bits_per_byte")


def _worst_ranks(bits: dict[str, dict[str, float]]) -> dict[str, int]:
    """The worst rank of each arm over the probes, from 1."""
    return {arm: max(1 + sum(other[probe] < bits[arm][probe] for other in bits.values()) for probe in PROBES) for arm in bits}


def _differences(checkpoint: Checkpoint) -> int:
    """Entries in which the arrays of a mixture of one denoiser and those of span corruption differ, over 64 windows of the run's data."""
    from cairn.training.recipe import Recipe
    from cairn.training.sources import open_data

    assert checkpoint.lineage is not None
    parsed = Recipe.parse(checkpoint.lineage.options["recipe"], "recipe in lineage")
    tokenizer, feed = open_data(parsed.data, parsed.seed, checkpoint.tokenizer)
    setting, samples = Setting(tokenizer, parsed.model, LENGTH, False), feed.samples(np.arange(64))
    row = Denoiser(**SPANS).model_dump()
    pair = [configure("objective", each).fitted(setting).arrays(samples) for each in ({"name": "ul2", "denoisers": [row]}, "span-corruption")]
    return sum(int((pair[0][name] != pair[1][name]).sum()) for name in pair[1])
