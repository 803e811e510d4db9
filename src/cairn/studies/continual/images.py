"""Variational autoencoders that learn from each other's images (card 90, proof b: the second kind of data).

Each generation is a run on the field `images` with the objective `elbo`: one hidden layer of 64 on either side of 8 latents, pixels 0 or 1. What it
reads is the pool of its policy, as for texts: a mixture of the real images and of those that every generation before it has drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cairn.checkpoint.format.read import Checkpoint
from cairn.continual.generations import Policy, pool
from cairn.data import datasets
from cairn.evaluation.answers import right_share
from cairn.evaluation.measure import evaluate
from cairn.fields.vision.autoencoder import Autoencoder, drawn
from cairn.fields.vision.processor import ImageProcessor
from cairn.randomness import seed_for
from cairn.studies.study import Figures, Say
from cairn.training.run import train

GENERATIONS, IMAGES, TESTED = 4, 6000, 2000
STEPS, BATCH, RATE = 2400, 100, 1e-3
HIDDEN, LATENTS, CLASSES = 64, 8, 10
GAIN = 3**-0.5
"""Weights begin as torch draws them."""
DRAWS = 8
"""Latents of one image over which its ELBO is averaged."""
POLICIES: tuple[Policy, ...] = ("replace", "accumulate", "subsample")

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class DigitImages:
    """Real images (n, 28, 28) of 0 and 255: 6000 that are learned and 2000 that are tested, with their labels."""

    learned: Pixels
    labels: NDArray[np.int64]
    tested: Pixels
    tested_labels: NDArray[np.int64]


def digits(seed: int) -> DigitImages:
    """`mnist-10k` in an order of its own, each pixel 255 from half of that on and otherwise 0."""
    images = (datasets.array("mnist-10k", "t10k-images-idx3-ubyte.gz") >= 128).astype(np.uint8) * np.uint8(255)
    labels = datasets.array("mnist-10k", "t10k-labels-idx1-ubyte.gz").astype(np.int64)
    order = np.random.default_rng(seed_for(seed, "digits")).permutation(len(labels))
    learned, tested = order[:IMAGES], order[IMAGES : IMAGES + TESTED]
    return DigitImages(images[learned], labels[learned], images[tested], labels[tested])


def stored(path: Path, images: Pixels, labels: NDArray[np.int64] | None = None) -> Path:
    """Images as a source of the field."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"images": images} | ({} if labels is None else {"labels": labels})
    np.savez(path, **arrays)
    return path


def pooled(policy: Policy, sets: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The sources of the next generation among the images D, S_2, ... of those before: of each so many as its policy says, drawn once."""
    weights = pool(policy, len(sets))
    parts = {f"generation-{number}": (path, weight) for number, (path, weight) in enumerate(zip(sets, weights, strict=True)) if weight}
    return {name: {"images": str(path), "weight": weight, "subset": round(weight * IMAGES)} for name, (path, weight) in parts.items()}


def recipe(seed: int, sources: Mapping[str, Any], steps: int, model: Mapping[str, Any], objective: str) -> dict[str, Any]:
    """Adam at a constant rate on batches of 100: as many updates for every pool."""
    return {
        "seed": seed,
        "model": dict(model),
        "data": {"name": "images", "sources": dict(sources), "held_out": 0, "mean": [0.0], "std": [1.0]},
        "objective": objective,
        "optimizer": {"name": "adamw", "lr": RATE, "betas": [0.9, 0.999], "weight_decay": 0.0},
        "schedule": "constant",
        "training": {"samples": f"{steps} steps", "batch": BATCH, "clip": None, "compile": False, "log_every": steps},
        "checkpoint": {"every": "100%"},
    }


def autoencoder(sources: Mapping[str, Any], folder: Path, seed: int, steps: int = STEPS) -> Checkpoint:
    """Trained on these images from scratch."""
    return train(
        recipe(seed, sources, steps, {"name": "vae", "hidden_sizes": [HIDDEN], "latent_size": LATENTS, "initializer_gain": GAIN}, "elbo"), folder
    ).newest()


def classifier(real: Path, folder: Path, seed: int, steps: int = STEPS // 4) -> Checkpoint:
    """784-64-10, trained on real images: it stays the same for all generations."""
    model = {"name": "mlp", "hidden_sizes": [HIDDEN], "rectified": True, "initializer_gain": GAIN}
    return train(recipe(seed, {"real": {"images": str(real)}}, steps, model, "classification"), folder).newest()


def elbo_of(checkpoint: Checkpoint, tested: Path, seed: int) -> float:
    """Mean ELBO of real images, nats per image, with latents that are the same for every model."""
    data = {"name": "images", "sources": {"tested": {"images": str(tested)}}, "held_out": 0}
    task = {"name": "elbo", "data": data, "split": "train", "samples": TESTED, "draws": DRAWS, "seed": seed, "batch": TESTED}
    return evaluate(checkpoint, [task], store=False, device="cpu")[0].value


@torch.no_grad()
def said(judge: nn.Module, processor: ImageProcessor, images: Pixels) -> Tensor:
    """The logits (n, 10) of a classifier for images."""
    found: Tensor = judge(torch.from_numpy(processor(images.reshape(len(images), *images.shape[1:3], 1))))
    return found


def class_entropy(logits: Tensor) -> float:
    """Entropy of the classes that a classifier sees in images, in nats; ln 10 where all are equally many; nan where a logit is no number."""
    if not bool(logits.isfinite().all()):
        return math.nan
    shares = torch.bincount(logits.argmax(1), minlength=CLASSES).double() / len(logits)
    return float(-(shares * shares.clamp_min(1e-300).log()).sum())


def image_arms(seed: int, work: Path, say: Say, steps: int = STEPS) -> Figures:
    """Test ELBO and class entropy over the generations of each policy; all begin with the same first generation."""
    real = digits(seed)
    learned, tested = stored(work / "learned.npz", real.learned, real.labels), stored(work / "tested.npz", real.tested)
    judged_by = classifier(learned, work / "classifier", seed_for(seed, "classifier") % 2**31, steps // 4)
    judge, processor = judged_by.model(), ImageProcessor.load(judged_by.path)
    first = autoencoder(pooled("replace", [learned]), work / "first", seed_for(seed, "images", 1) % 2**31, steps)
    accuracy = right_share(said(judge, processor, real.tested), torch.from_numpy(real.tested_labels))
    found: Figures = {"classifier": accuracy, "largest_entropy": math.log(CLASSES)}
    for policy in POLICIES:
        say(f"seed {seed}, images, {policy}")
        sets, model = [learned], first
        found[policy] = {"elbo": [], "entropy": []}
        for number in range(1, GENERATIONS + 1):
            if number > 1:
                model = autoencoder(pooled(policy, sets), work / f"{policy}-{number}", seed_for(seed, "images", number) % 2**31, steps)
            images = drawn(cast(Autoencoder, model.model()), IMAGES, seed_for(seed, "drawn", number))
            sets.append(stored(work / f"{policy}-{number}.npz", images))
            found[policy]["elbo"].append(elbo_of(model, tested, seed_for(seed, "latents") % 2**31))
            found[policy]["entropy"].append(class_entropy(said(judge, processor, images)))
    return found
