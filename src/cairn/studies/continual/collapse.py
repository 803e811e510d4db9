"""Language models that learn from each other's text, and autoencoders from each other's images: replaced, accumulated, subsampled (card 90)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from cairn import plotting
from cairn.catalog import Paper, register
from cairn.continual.collapse import Keeping, factor, regression_chain, regression_error
from cairn.continual.generations import ModelGeneration, Policy, generations
from cairn.data import corpora
from cairn.data.corpora import up_to
from cairn.studies import bases
from cairn.studies.conditions import Condition, above, at_least, at_most, below, judged, stated
from cairn.studies.continual import arms
from cairn.studies.continual.images import image_arms
from cairn.studies.study import Figures, Say, Study

GENERATIONS, STEPS, BYTES = 5, 150, 100_000
COLD = 0.3
Arm = Literal["replace", "accumulate", "subsample", "cold"]


@register(
    "study",
    "model-collapse",
    paper=Paper("Is Model Collapse Inevitable? Breaking the Curse of Recursion by Accumulating Real and Synthetic Data", "arXiv:2404.01413", card=90),
)
class ModelCollapse(Study):
    """Models that learn from what the model before them made get worse; with the real data and all earlier ones kept, they do so far less."""

    minutes: ClassVar[float] = 11
    published: ClassVar[str] = (
        "Replacing the data by the newest model's text raises the test loss of successive language models steadily; accumulating keeps it flat, over sizes, "
        "architectures and temperatures. Linear regression: linear growth against a bound of pi^2/6."
    )
    protocol: ClassVar[str] = (
        "A byte-level LLaMA (2 layers, width 64, context 128, batch 8; smaller than the card's) learns 100 kB of tiny-shakespeare (a fifth held out) from "
        "scratch in 150 steps and writes as much, documents of up to 120 bytes at temperature 1; five generations under replace, accumulate and subsample, "
        "all with the same compute (accumulate reads its larger pool evenly), each with its own seed. A replace arm at temperature 0.3 goes three "
        "generations. Loss on held-out real text; distinct-4 of words; self-BLEU, duplicates and tail mass are reported. Images: a variational autoencoder "
        "(784-64-8, binary pixels) learns 6000 images of mnist-10k (the card's Fashion-MNIST is not at hand) from scratch in 2400 updates of 100, and draws "
        "as many from its plain distribution; four generations under each policy, all with the same compute and the same first generation. ELBO on 2000 "
        "other real images; entropy of the classes that a classifier of real images, the same for all, sees in what is drawn is reported. Exact: errors of "
        "ten generations of linear regression (T = 40, d = 5), 3000 repetitions. Three seeds."
    )
    control: ClassVar[str] = (
        "The names of the policies are swapped: what was accumulated is called replaced, and the other way round, also in the regression and for images."
    )

    def run(self, seed: int, work: Path, *, sabotage: bool, say: Say) -> Figures:
        if seed not in _done:
            _done[seed] = {"arms": _arms(seed, say), "regression": _regression(seed), "images": image_arms(seed, work / "images", say)}
        swapped = {"replace": "accumulate", "accumulate": "replace"} if sabotage else {}
        return _summary({part: {swapped.get(name, name): figures for name, figures in named.items()} for part, named in _done[seed].items()})

    def check(self, runs: Sequence[Figures]) -> list[Condition]:
        def each(key: str) -> list[float]:
            return [run[key] for run in runs]

        known = "regression: simulated minus closed form, standard errors"
        return [
            stated(known, "<= 3.5, in every seed", ", ".join(f"{z:.3f}" for z in each("regression_z")), max(each("regression_z")) <= 3.5, always=True),
            judged("replace: loss of generation 5 minus 1", each("replace_rise"), at_least(0.1), rule="mean", unit="nats", main=True),
            stated("replace: steps that rise, of 4", ">= 3 in every seed", ", ".join(map(str, each("rises"))), min(each("rises")) >= 3, main=True),
            judged("accumulate: loss of generation 5 minus 1", each("accumulate_rise"), at_most(0.03), rule="mean", unit="nats", main=True),
            judged("replace minus accumulate", each("difference"), above(0), rule="mean", unit="nats", main=True),
            judged("replace: distinct-4 of the texts, last minus first", each("distinct"), below(0), rule="mean"),
            judged("replace: distinct-4 of the second text, at temperature 1 minus 0.3", each("cold"), above(0), rule="mean"),
            judged("images: fall of the test ELBO, replace minus accumulate", each("images_apart"), above(0), unit="nats", main=True),
        ]

    def draw(self, runs: Sequence[Figures], path: Path) -> None:
        text = {"loss": "loss on held-out real text, nats per byte", "distinct": "distinct-4 of its text", "self_bleu": "self-BLEU of its text"}
        pictures = {"elbo": "ELBO of real test images, nats", "entropy": "entropy of the classes that it draws, nats"}
        figure, axes = plotting.panels(len(text) + len(pictures))
        for axis, (kind, (key, title)) in zip(
            axes, [*(("arms", each) for each in text.items()), *(("images", each) for each in pictures.items())], strict=True
        ):
            for name in ("replace", "accumulate", "subsample", *(("cold",) if kind == "arms" else ())):
                mean = np.mean([run[kind][name][key] for run in runs], axis=0)
                axis.plot(range(1, len(mean) + 1), mean, marker="o", label=f"replace, temperature {COLD}" if name == "cold" else name)
            axis.set(xlabel="generation", title=title)
        axes[0].legend()
        plotting.save(figure, path)


_done: dict[int, Figures] = {}


def _recipe(seed: int) -> dict[str, Any]:
    texts = bases.text_file(document.text for document in up_to(corpora.resolve("tiny-shakespeare").documents(), BYTES))
    made = arms.recipe(seed, {"plays": {"corpus": str(texts)}}, STEPS, {"name": "cosine", "warmup": "10 steps"})
    made["data"] |= {"sequence_length": 128, "held_out": 0.2}
    return made | {"callbacks": []}


def _arms(seed: int, say: Say) -> Figures:
    recipe = _recipe(seed)
    plans: dict[str, tuple[Policy, int, float]] = {name: (name, GENERATIONS, 1.0) for name in ("replace", "accumulate", "subsample")}
    plans["cold"] = ("replace", 3, COLD)
    found = {}
    for name, (policy, count, temperature) in plans.items():

        def tell(text: str, name: str = name) -> None:
            say(f"seed {seed}, {name}: {text}")

        words = {"policy": policy, "count": count, "temperature": temperature, "longer": False, "longest": 120, "batch": 256}
        folder = bases.folder_for("generations", bases.key_of(recipe), words)
        seen = generations(recipe, folder, **words, say=tell)  # type: ignore[arg-type]
        found[name] = _figures(seen)
    return found


def _figures(seen: Sequence[ModelGeneration]) -> Figures:
    varied = [each.diversity for each in seen if each.diversity is not None]
    return {
        "loss": [each.loss for each in seen],
        "tail_mass": [each.tail_mass for each in seen],
        "distinct": [each.distinct_4 for each in varied],
        "entropy": [each.entropy for each in varied],
        "coverage": [each.coverage for each in varied],
        "tail": [each.tail for each in varied],
        "self_bleu": [each.self_bleu for each in varied],
        "duplicates": [each.duplicates for each in varied],
    }


def _regression(seed: int) -> Figures:
    random = np.random.default_rng(seed)
    design, truth = random.standard_normal((40, 5)), random.standard_normal(5)
    found: Figures = {}
    kept: tuple[Keeping, ...] = ("replace", "accumulate")
    for keeping in kept:
        errors = regression_chain(design, truth, 1.0, 10, keeping, 3000, random)
        found[keeping] = {"mean": errors.mean(1).tolist(), "stderr": (errors.std(1, ddof=1) / math.sqrt(3000)).tolist()}
        found[keeping]["first"] = regression_error(design, 1.0, 1, keeping)
    return found


def _summary(found: Figures) -> Figures:
    loss = {name: each["loss"] for name, each in found["arms"].items()}
    distinct = {name: each["distinct"] for name, each in found["arms"].items()}
    replace, accumulate = ([loss[name][i] - loss[name][0] for i in range(GENERATIONS)] for name in ("replace", "accumulate"))
    names: tuple[Keeping, ...] = ("replace", "accumulate")
    return {
        **found,
        "regression_z": max(_distance(found["regression"][name], name) for name in names),
        "replace_rise": replace[-1],
        "accumulate_rise": accumulate[-1],
        "difference": replace[-1] - accumulate[-1],
        "rises": sum(later > earlier for earlier, later in pairwise(replace)),
        "distinct": distinct["replace"][-1] - distinct["replace"][0],
        "cold": distinct["replace"][1] - distinct["cold"][1],
        "images_apart": _fall(found["images"]["replace"]) - _fall(found["images"]["accumulate"]),
    }


def _fall(images: Figures) -> float:
    """By how much the test ELBO of the last generation is below that of the first."""
    return images["elbo"][0] - images["elbo"][-1]


def _distance(simulated: Figures, keeping: Keeping) -> float:
    """Largest distance of a simulated error from the formula of that policy, in standard errors."""
    pairs = zip(simulated["mean"], simulated["stderr"], strict=True)
    return max(abs(mean - simulated["first"] * factor(n, keeping)) / error for n, (mean, error) in enumerate(pairs, start=1))
