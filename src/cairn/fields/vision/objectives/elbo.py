"""The evidence lower bound of a variational autoencoder.

    ELBO(x) = E log p(x | z) - KL(q(z | x), N(0, 1)),   z = m + noise * s        [nats per image]
    log p(x | z) = sum over pixels of x log p + (1 - x) log(1 - p)               pixels from 0 to 1
    KL(N(m, s^2), N(0, 1)) = sum over latents of (m^2 + s^2 - 1 - log s^2) / 2

The noise of a sample follows from the seed of the run and its position alone, so that a resumed run sees the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from pydantic import Field

from cairn.catalog import Paper, register
from cairn.errors import InputError
from cairn.randomness import normal
from cairn.training.objectives import Loss, Objective, Setting

if TYPE_CHECKING:
    import torch
    from torch import nn


def divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, exp log_variance), N(0, 1)) of each row (n,), in nats."""
    return ((mean**2 + log_variance.exp() - 1 - log_variance) / 2).sum(1)


def log_likelihood(logits: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """log p(x | z) of each image (n,), in nats, from the logits of its pixels and the pixels, both (n, C, H, W)."""
    from torch.nn.functional import binary_cross_entropy_with_logits

    wide = logits if logits.dtype.itemsize >= 4 else logits.float()
    return -binary_cross_entropy_with_logits(wide, pixels.to(wide), reduction="none").flatten(1).sum(1)


def latent_noise(keys: np.ndarray, latents: int) -> np.ndarray:
    """Standard normal numbers (n, latents), float32: of each sample its own, by its key (n,)."""
    return normal(keys[:, None], np.arange(latents)).astype(np.float32)


def refuse_other_models(model: Any, preprocessor: Any) -> int:
    """How many latents a model has. Raises `InputError` for a family without latents, and for pixels that do not lie between 0 and 1."""
    latents = getattr(model, "latent_size", None)
    if latents is None:
        raise InputError(f"A '{model.model_type}' has no latents, so it has no ELBO; take the family 'vae', or another objective.")
    if set(preprocessor.mean) != {0.0} or set(preprocessor.std) != {1.0}:
        raise InputError("The ELBO reads pixels as probabilities from 0 to 1; set data.mean=[0.0] and data.std=[1.0].")
    return int(latents)


@register("objective", "elbo", paper=Paper("Auto-Encoding Variational Bayes", "arXiv:1312.6114"))
class Elbo(Objective):
    """Minus the evidence lower bound of each image; metrics.jsonl has its two terms, `likelihood` and `divergence`, beside."""

    needs: ClassVar[frozenset[str]] = frozenset({"images"})

    sample_changes: ClassVar[Mapping[str, Any]] = {
        "model": {"name": "vae", "hidden_sizes": [16], "latent_size": 3},
        "data.mean": [0.0],
        "data.std": [1.0],
    }

    latents: int | None = Field(None, ge=1)
    """Latents of the model; left open, the model's."""

    def fitted(self, setting: Setting) -> Self:
        latents = refuse_other_models(setting.model, setting.preprocessor)
        if self.latents not in (None, latents):
            raise InputError(f"objective.latents is {self.latents}, and the model has {latents}; leave it out to take the model's.")
        return super().fitted(setting).model_copy(update={"latents": latents})

    def arrays(self, samples: Any) -> dict[str, np.ndarray]:
        """The inputs of the samples, their `noise` (n, Z) and `weights` (n, 1)."""
        assert self.latents is not None  # fitted has said it
        return {**samples.inputs, "noise": latent_noise(samples.keys, self.latents), "weights": np.ones((len(samples.keys), 1), np.float32)}

    def loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Loss:
        likelihood, apart = self._terms(model, batch)
        weights = batch["weights"][:, 0]
        return Loss((weights * (apart - likelihood)).sum(), {"likelihood": (weights * likelihood).sum(), "divergence": (weights * apart).sum()})

    @property
    def separable(self) -> bool:
        return True

    def token_losses(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The loss of each image (n, 1)."""
        likelihood, apart = self._terms(model, batch)
        return (apart - likelihood)[:, None]

    def _terms(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        made = model(batch["pixel_values"], batch["noise"])
        return log_likelihood(made.logits, batch["pixel_values"]), divergence(made.mean.to(batch["pixel_values"]), made.log_variance.to(batch["pixel_values"]))
