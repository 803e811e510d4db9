"""Variational autoencoders that learn from each other's images (card 90, proof b: the second kind of data).

    ELBO(x) = E log p(x | z) - KL(q(z | x), N(0, 1)),  z ~ q(z | x) = N(m(x), s(x)^2);  p(x | z): independent pixels, 0 or 1

One hidden layer of 64 on either side of 8 latents. What each generation reads is the pool of its policy, as for texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cairn.continual.generations import Policy, pool
from cairn.data import datasets
from cairn.evaluation.answers import right_share
from cairn.randomness import seed_for
from cairn.studies.study import Figures, Say

M = TypeVar("M", bound=nn.Module)
GENERATIONS, IMAGES, TESTED = 4, 6000, 2000
STEPS, BATCH, RATE = 2400, 100, 1e-3
HIDDEN, LATENTS, CLASSES = 64, 8, 10
DRAWS = 8
"""Latents of one image over which its ELBO is averaged."""
POLICIES: tuple[Policy, ...] = ("replace", "accumulate", "subsample")


class Autoencoder(nn.Module):
    """784-64-8 and back: images (n, 784) of zeros and ones."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(784, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENTS))
        self.decoder = nn.Sequential(nn.Linear(LATENTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 784))

    def elbo(self, images: Tensor, noise: Tensor) -> Tensor:
        """Of each image (n,), in nats, with the latents that the standard normal `noise` (n, 8) makes."""
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        pixels = self.decoder(mean + noise * (log_variance / 2).exp())
        likelihood = -functional.binary_cross_entropy_with_logits(pixels, images, reduction="none").sum(1)
        return likelihood - divergence(mean, log_variance)


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp log_variance), N(0, 1)) of each row (n,), in nats."""
    return ((mean**2 + log_variance.exp() - 1 - log_variance) / 2).sum(1)


@dataclass(frozen=True)
class DigitImages:
    """Real images as zeros and ones: those that are learned (6000, 784), with their labels, and those that are tested (2000, 784)."""

    learned: Tensor
    labels: Tensor
    tested: Tensor
    tested_labels: Tensor


def digits(seed: int) -> DigitImages:
    """`mnist-10k` in an order of its own, each pixel 1 from half of the full value on."""
    images = datasets.array("mnist-10k", "t10k-images-idx3-ubyte.gz").reshape(-1, 784) >= 128
    labels = datasets.array("mnist-10k", "t10k-labels-idx1-ubyte.gz")
    order = np.random.default_rng(seed_for(seed, "digits")).permutation(len(labels))
    learned, tested = order[:IMAGES], order[IMAGES : IMAGES + TESTED]
    pixels, classes = torch.tensor(images).float(), torch.tensor(labels).long()
    return DigitImages(pixels[learned], classes[learned], pixels[tested], classes[tested])


def pooled(policy: Policy, sets: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """What the next generation reads of the images D, S_2, ... of those before: so many of each as its policy says, drawn once."""
    weights = pool(policy, len(sets))
    parts = [images[torch.randperm(len(images), generator=generator)[: round(weight * len(images))]] for images, weight in zip(sets, weights, strict=True)]
    return torch.cat(parts)


def trained(make: Callable[[], M], loss: Callable[[M, Tensor, torch.Generator], Tensor], rows: int, seed: int, steps: int = STEPS) -> M:
    """A new model after so many updates of Adam on batches drawn from `rows` rows: `loss` is shown which. As many for every pool."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(steps):
        chosen = torch.randint(rows, (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss(model, chosen, generator).backward()
        optimizer.step()
    return model.eval()


def autoencoder(images: Tensor, seed: int, steps: int = STEPS) -> Autoencoder:
    """Trained on these images from scratch."""

    def loss(model: Autoencoder, chosen: Tensor, generator: torch.Generator) -> Tensor:
        return -model.elbo(images[chosen], torch.randn(len(chosen), LATENTS, generator=generator)).mean()

    return trained(Autoencoder, loss, len(images), seed, steps)


def classifier(images: Tensor, labels: Tensor, seed: int, steps: int = STEPS // 4) -> nn.Module:
    """784-64-10, trained on real images: it stays the same for all generations."""

    def loss(model: nn.Module, chosen: Tensor, generator: torch.Generator) -> Tensor:
        return functional.cross_entropy(model(images[chosen]), labels[chosen])

    return trained(lambda: nn.Sequential(nn.Linear(784, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)), loss, len(images), seed, steps)


@torch.no_grad()
def sampled(model: Autoencoder, count: int, generator: torch.Generator) -> Tensor:
    """Images (count, 784) from the model's plain distribution: a latent, then each pixel."""
    return torch.bernoulli(model.decoder(torch.randn(count, LATENTS, generator=generator)).sigmoid(), generator=generator)


@torch.no_grad()
def elbo_of(model: Autoencoder, images: Tensor, seed: int) -> float:
    """Mean ELBO of real images, nats per image, with latents that are the same for every model."""
    generator = torch.Generator().manual_seed(seed)
    return float(torch.stack([model.elbo(images, torch.randn(len(images), LATENTS, generator=generator)).mean() for _ in range(DRAWS)]).mean())


@torch.no_grad()
def class_entropy(judge: nn.Module, images: Tensor) -> float:
    """Entropy of the classes that a classifier sees in images, in nats; ln 10 where all are equally many."""
    said = judge(images)
    if not bool(said.isfinite().all()):
        return math.nan
    shares = torch.bincount(said.argmax(1), minlength=CLASSES).double() / len(images)
    return float(-(shares * shares.clamp_min(1e-300).log()).sum())


def image_arms(seed: int, say: Say, steps: int = STEPS) -> Figures:
    """Test ELBO and class entropy over the generations of each policy; all begin with the same first generation."""
    real = digits(seed)
    judge = classifier(real.learned, real.labels, seed_for(seed, "classifier") % 2**31, steps // 4)
    with torch.no_grad():
        accuracy = right_share(judge(real.tested), real.tested_labels)
    first = autoencoder(real.learned, seed_for(seed, "images", 1) % 2**31, steps)
    found: Figures = {"classifier": accuracy, "largest_entropy": math.log(CLASSES)}
    for policy in POLICIES:
        say(f"seed {seed}, images, {policy}")
        generator = torch.Generator().manual_seed(seed_for(seed, "drawn") % 2**31)
        sets, model = [real.learned], first
        found[policy] = {"elbo": [], "entropy": []}
        for number in range(1, GENERATIONS + 1):
            if number > 1:
                model = autoencoder(pooled(policy, sets, generator), seed_for(seed, "images", number) % 2**31, steps)
            sets.append(sampled(model, IMAGES, generator))
            found[policy]["elbo"].append(elbo_of(model, real.tested, seed_for(seed, "latents") % 2**31))
            found[policy]["entropy"].append(class_entropy(judge, sets[-1]))
    return found
