"""Sequences that count by their loss: regression with a known best, and language modelling with redundant text (card 38, proofs b and c)."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from cairn import plotting
from cairn.catalog import Paper, register
from cairn.errors import InputError
from cairn.evaluation.measure import evaluate
from cairn.randomness import bits, permutation, seed_for
from cairn.studies import bases, library
from cairn.studies.conditions import Condition, above, judged, stated
from cairn.studies.study import Figures, Say, Study
from cairn.training.reweighting.loss_based import loss_weights
from cairn.training.run import Run

WEIGHTINGS = ("linupper", "quadratic", "uniform", "extremes")
REGRESSION_SEEDS = range(10)
TEMPERATURE = 0.4
STEPS, SEQUENCES, LENGTH = 300, 32, 48


@register(
    "study",
    "loss-reweighting",
    paper=Paper("Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining", "arXiv:2502.06733", card=38),
)
class LossReweighting(Study):
    """What is known already counts less: faster where the model can fit the data or many sequences are redundant."""

    minutes: ClassVar[float] = 7
    published: ClassVar[str] = (
        "Down-weighting sequences of low loss (LinUpper, then Quadratic) beats uniform weights, up-weighting both extremes does not help; in a "
        "regression LinUpper converges fastest, Quadratic second, uniform third; better benchmark averages at 1.4B and 7B."
    )
    protocol: ClassVar[str] = (
        "Regression: scikit-learn's diabetes (442 x 10, standardised, and a constant), 140 rows held out, batches of 32, 300 gradient steps from "
        "zero, area under the held-out error, temperature 0.4, ten splits. Interpolating: targets of the least-squares fit, step 0.02. Noisy: true "
        "targets, step 0.05, plain and with 90 % of the training rows copies of ten (reported; the first form of this case, seen before this record, "
        "diverged at that step). Language: byte-level LLaMA (3 layers, width 96), batch 32 x 48, 300 steps, lr 3e-3, cosine; half of the windows are "
        "one text repeated, 2 % random characters, the rest python-source and python-docs; "
        "uniform, LinUpper, Quadratic at temperature 0.4 from the start, on the same batches; held-out loss on the clean sources. Three seeds. The "
        "same without corruption is reported for seed 0."
    )
    control: ClassVar[str] = (
        "Weights are handed to the wrong rows in the regression, and the weighting 'extremes' takes LinUpper's place in the language model."
    )

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        regression = _regressions(shuffled=sabotage) if seed == self.seeds[0] else {}
        arms = {"uniform": "uniform", "linupper": "extremes" if sabotage else "linupper", "quadratic": "quadratic"}
        figures: Figures = {"regression": regression, "language": {}}
        for name, weighting in arms.items():
            say(f"seed {seed}: {name}")
            figures["language"][name] = _figures(bases.run_of(_recipe(seed, weighting, corrupted=True), say=say))
        if seed == self.seeds[0] and not sabotage:
            figures["uncorrupted"] = {name: _figures(bases.run_of(_recipe(seed, name, corrupted=False), say=say))["loss"] for name in ("uniform", "linupper")}
        return figures

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        found = runs[0]["regression"]["interpolating"]
        ordered = sum(all(a < b for a, b in itertools.pairwise(row)) for row in zip(*(found[name] for name in WEIGHTINGS), strict=True))
        gains = [run["language"]["uniform"]["loss"] - run["language"]["linupper"]["loss"] for run in runs]
        noise = [(run["language"]["linupper"]["noise"], run["language"]["quadratic"]["noise"]) for run in runs]
        least = [min(run["language"][name]["ess"] for name in ("linupper", "quadratic")) for run in runs]
        means = ", ".join(f"{np.mean(found[name]):.4f}" for name in WEIGHTINGS)
        return [
            stated(
                "regression: LinUpper < Quadratic < uniform < Extremes",
                "in 10 of 10 splits",
                f"in {ordered} (means {means})",
                ordered == 10,
                main=True,
                always=True,
            ),
            judged("language: held-out loss, uniform minus LinUpper", gains, above(0), unit="nats", form=".4f", main=True),
            judged("the same on the mean", gains, above(0.01), rule="mean", unit="nats", form=".4f", main=True),
            judged(
                "weight of random windows: LinUpper minus Quadratic",
                [upper - quadratic for upper, quadratic in noise],
                above(0),
                found="; ".join(f"{upper:.4f}, {quadratic:.4f}" for upper, quadratic in noise),
            ),
            judged("smallest mean of the effective sample size", least, above(round(SEQUENCES / 3, 1)), unit=f"of {SEQUENCES}", form=".1f"),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        figure, axes = plotting.subplots(1, 2, figsize=(10, 3.6))
        cases = list(runs[0]["regression"])
        for offset, name in enumerate(WEIGHTINGS):
            values = [np.mean(runs[0]["regression"][case][name]) / np.mean(runs[0]["regression"][case]["uniform"]) for case in cases]
            axes[0].bar(np.arange(len(cases)) + 0.2 * (offset - 1.5), values, 0.2, label=name)
        axes[0].set_xticks(range(len(cases)), cases)
        axes[0].set(title="regression: area under the error, uniform = 1")
        axes[0].legend()
        for name in runs[0]["language"]:
            axes[1].plot(np.mean([run["language"][name]["curve"] for run in runs], axis=0), label=name)
        axes[1].set(title="language: held-out loss on clean text, mean of seeds", xlabel="evaluation")
        axes[1].legend()
        plotting.save(figure, path)


def _regressions(*, shuffled: bool) -> dict[str, dict[str, list[float]]]:
    """Area under the held-out error by case and weighting, one figure for each split."""
    cases = {"interpolating": (True, 0.02, 0.0), "noisy": (False, 0.05, 0.0), "noisy, 90 % redundant": (False, 0.05, 0.9)}
    return {
        case: {name: [_area(seed, name, *settings, shuffled=shuffled) for seed in REGRESSION_SEEDS] for name in WEIGHTINGS} for case, settings in cases.items()
    }


def _area(seed: int, weighting: str, fitted: bool, step: float, redundant: float, *, shuffled: bool) -> float:
    """Mean held-out error over 300 steps of weighted gradient descent on squared errors."""
    features, targets = _diabetes()
    if fitted:
        targets = features @ np.linalg.lstsq(features, targets, rcond=None)[0]
    order = permutation(seed_for(seed, "split"), len(features), np.arange(len(features)))
    test, rows = order[:140], order[140:]
    places = np.arange(len(rows))
    rows = np.where(places < redundant * len(rows), rows[places % 10], rows)
    theta, errors = np.zeros(features.shape[1]), []
    for number in range(300):
        batch = rows[bits(seed_for(seed, "batch", number), np.arange(32)).astype(np.int64) % len(rows)]
        residuals = features[batch] @ theta - targets[batch]
        weights = loss_weights(torch.from_numpy(residuals**2), weighting, TEMPERATURE).numpy()
        if shuffled:
            weights = weights[permutation(seed_for(seed, "wrong", number), 32, np.arange(32))]
        theta = theta - step * 2 * (weights * residuals) @ features[batch]
        errors.append(float(np.mean((features[test] @ theta - targets[test]) ** 2)))
    return float(np.mean(errors))


def _diabetes() -> tuple[np.ndarray, np.ndarray]:
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError:
        raise InputError("This study needs scikit-learn: pip install 'cairn-lm[science]'.") from None
    features, targets = datasets.load_diabetes(return_X_y=True)
    features = (features - features.mean(0)) / features.std(0)
    return np.hstack([features, np.ones((len(features), 1))]), (targets - targets.mean()) / targets.std()


def _recipe(seed: int, weighting: str, *, corrupted: bool) -> dict[str, Any]:
    share = 0.24 if corrupted else 0.5
    clean = {"python-source": {"corpus": library.source("4 MiB"), "weight": share}, "python-docs": {"corpus": library.docs("4 MiB"), "weight": share}}
    dirt = {
        "repeated": {"corpus": str(bases.text_file(_repeated())), "weight": 0.5},
        "noise": {"corpus": str(bases.text_file(_noise())), "weight": 0.02},
    }
    return {
        "seed": seed,
        "model": {"name": "llama", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4},
        "data": {"tokenizer": "byte", "sources": clean | (dirt if corrupted else {}), "sequence_length": LENGTH, "held_out": 0.05},
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "schedule": {"name": "cosine", "warmup": "30 steps", "final": 0.1},
        "reweighting": {"name": "loss-based", "weighting": weighting, "temperature": TEMPERATURE, "warmup": "0 tokens"},
        "training": {"tokens": f"{STEPS} steps", "batch": SEQUENCES * LENGTH, "compile": False},
        "checkpoint": {"every": "60 steps"},
    }


def _repeated() -> Iterator[str]:
    """One text of two thousand characters, two hundred times; numbered by its last line, since equal documents would all be on one side of the split."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return (f"{topics['specialnames'][:2000]}\n{number}" for number in range(200))


def _noise() -> Iterator[str]:
    """Printable characters at random."""
    return ("".join(chr(32 + int(v % 95)) for v in bits(seed_for(0, "noise", number), np.arange(2000))) for number in range(40))


def _figures(run: Run) -> Figures:
    """Clean held-out loss along the run, and what the weights were."""
    rows = run.metrics()
    curve = [_clean_loss(path) for path in run.checkpoints()]
    noise = [row["reweighting/share/noise"] for row in rows if "reweighting/share/noise" in row]
    return {
        "loss": curve[-1],
        "curve": curve,
        "noise": float(np.mean(noise)) if noise else None,
        "ess": float(np.mean([row["reweighting/ess"] for row in rows])),
    }


def _clean_loss(path: Path) -> float:
    """Mean over the two clean sources of the loss on text that no run has seen: the part of them behind the first four megabytes."""
    rows = evaluate(path, [{"name": "held-out", "corpus": str(_clean_file()), "sequence_length": LENGTH, "sequences": 512}], store=False)
    return next(row.value for row in rows if row.metric == "loss")


def _clean_file() -> Path:
    """Fifty documents of each clean source that lie beyond what training reads."""
    if "file" not in _kept:
        from itertools import islice

        from cairn.data import corpora

        texts: list[str] = []
        for spec in (library.source("6 MiB"), library.docs("6 MiB")):
            size, later = 0, []
            for document in islice(corpora.resolve(spec).documents(), 100_000):
                size += len(document.text.encode(errors="surrogatepass"))
                if size > 5 * 2**20:
                    later.append(document.text[:4000])
            texts += later[:50]
        _kept["file"] = bases.text_file(texts)
    return _kept["file"]


_kept: dict[str, Path] = {}
"""The file of clean text, made once."""
