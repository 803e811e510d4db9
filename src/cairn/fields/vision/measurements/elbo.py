"""The evidence lower bound of images that were kept out of training.

ELBO = mean over images of log p(x | z) - KL(q(z | x), N(0, 1)), averaged over draws of z        [nats per image]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cairn.catalog import Paper, register
from cairn.errors import InputError
from cairn.evaluation.measure import Measurement, Score
from cairn.fields.vision.objectives.elbo import Elbo, divergence, latent_noise, log_likelihood, refuse_other_models
from cairn.options import Method
from cairn.randomness import bits, seed_for
from cairn.statistics import mean_error

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.order.feed import Feed


@register("measurement", "elbo", paper=Paper("Auto-Encoding Variational Bayes", "arXiv:1312.6114"))
class EvidenceBound(Measurement):
    """Evidence lower bound of images under a variational autoencoder, with latents that are the same for every model."""

    reads: ClassVar[str] = "images"

    one_at_a_time: ClassVar[Mapping[str, Any]] = {"batch": 1}
    sample_changes: ClassVar[Mapping[str, Any]] = {**Elbo.sample_changes, "objective": "elbo"}

    samples: int = Field(10_000, ge=1)
    """Images that are read, always the same ones; all of the split where it has fewer."""
    draws: int = Field(8, ge=1)
    """Latents of one image over which its bound is averaged."""
    split: Literal["held_out", "train"] = "held_out"
    """The part of the data: what was kept out of training, or what is trained on."""
    data: Annotated[Any, Method("field", optional=True)] = None
    """Other data than the run's own: a mapping with the name of a field and its options; with `held_out: 0` and `split: train` all of them."""
    seed: int = Field(0, ge=0)
    batch: int = Field(256, ge=1)
    """Images of one forward pass; changes nothing but speed."""

    def needs_feed(self) -> bool:
        return self.data is None

    def data_digest(self, feed: Feed | None = None) -> str:
        return ",".join(feed.digests().values()) if feed is not None else ""

    def protocol(self, feed: Feed | None = None) -> dict[str, Any]:
        described = super().protocol(feed)
        del described["batch"]
        if self.data is not None:
            described["sources"] = self.data.open(0)[1].digests()
        return described

    def of(self, model: nn.Module, preprocessor: Any, feed: Feed | None = None) -> list[Score]:
        latents = refuse_other_models(model.architecture, preprocessor)
        if self.data is not None:
            feed = self.data.open(0, preprocessor)[1]
        if feed is None:
            raise InputError("elbo needs the data of the run, or data={name: images, sources: {...}}.")
        bounds = self._bounds(model, feed.evenly(self.samples, self.split).inputs["pixel_values"], latents)
        if not np.isfinite(bounds).all():
            return [Score("elbo", "elbo", math.nan, math.nan, len(bounds))]
        return [Score("elbo", "elbo", float(bounds.mean()), mean_error(bounds), len(bounds))]

    def _bounds(self, model: nn.Module, pixels: NDArray[np.float32], latents: int) -> NDArray[np.float64]:
        """The bound of each image (n,)."""
        import torch

        parameter, found = next(model.parameters()), []
        with torch.no_grad():
            for first in range(0, len(pixels), self.batch):
                part = pixels[first : first + self.batch]
                images = torch.from_numpy(np.ascontiguousarray(part)).to(parameter)
                total = torch.zeros(len(part), dtype=torch.float64, device=parameter.device)
                for draw in range(self.draws):
                    keys = bits(seed_for(self.seed, "elbo", draw), np.arange(first, first + len(part)))
                    made = model(images, torch.from_numpy(latent_noise(keys, latents)).to(parameter))
                    total += (log_likelihood(made.logits, images) - divergence(made.mean.float(), made.log_variance.float())).double()
                found.append((total / self.draws).cpu().numpy())
        return np.concatenate(found)
