"""The network of the family `vae`, and drawing images from it.

z = m(x) + noise * s(x)        noise ~ N(0, 1)
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cairn.randomness import normal, seed_for, uniform


class Sizes(Protocol):
    """What the network has to know of its family's config."""

    @property
    def image_size(self) -> int: ...
    @property
    def num_channels(self) -> int: ...
    @property
    def encoder_widths(self) -> list[int]: ...
    @property
    def decoder_widths(self) -> list[int]: ...
    @property
    def latent_size(self) -> int: ...


class Reconstruction(NamedTuple):
    """What an autoencoder makes of images: logits of the pixels (B, C, H, W), and of each latent the mean and the logarithm of the variance (B, Z)."""

    logits: Tensor
    mean: Tensor
    log_variance: Tensor


class _Layers(nn.Module):
    """Linear layers with rectifiers between them."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(wide, narrow) for wide, narrow in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        found: Tensor = self.layers[-1](x)
        return found


class Autoencoder(nn.Module):
    """Images (B, C, H, W) with values from 0 to 1 through latents and back."""

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        self.architecture = config
        self.encoder, self.decoder = _Layers(config.encoder_widths), _Layers(config.decoder_widths)

    def blocks(self) -> list[nn.Module]:
        """Encoder and decoder: what sharding works on."""
        return [self.encoder, self.decoder]

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the latents (B, Z) of each image."""
        mean, log_variance = self.encoder(pixel_values.flatten(1)).chunk(2, dim=1)
        return mean, log_variance

    def decode(self, latents: Tensor) -> Tensor:
        """Logits of the pixels (B, C, H, W) that latents (B, Z) make."""
        config = self.architecture
        return self.decoder(latents).view(-1, config.num_channels, config.image_size, config.image_size)

    def forward(self, pixel_values: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """Through the latents that standard normal `noise` (B, Z) makes; without it through their means."""
        mean, log_variance = self.encode(pixel_values)
        latents = mean if noise is None else mean + noise.to(mean) * (log_variance / 2).exp()
        return Reconstruction(self.decode(latents), mean, log_variance)


@torch.no_grad()
def drawn(model: Autoencoder, count: int, seed: int) -> np.ndarray:
    """Images (count, H, W, C) of 0 and 255 that a model makes of latents of its own: z ~ N(0, 1), then each pixel by its probability.

    The n-th image depends on the seed and on n alone, so that fewer images are the first of more.
    """
    config, parameter = model.architecture, next(model.parameters())
    pixels, found = config.num_channels * config.image_size**2, []
    for first in range(0, count, 1024):
        numbers = np.arange(first, min(first + 1024, count))[:, None]
        latents = normal(seed_for(seed, "latents"), numbers * config.latent_size + np.arange(config.latent_size))
        chances = model.decode(torch.from_numpy(latents).to(parameter)).sigmoid().double().flatten(1).cpu().numpy()
        found.append(uniform(seed_for(seed, "pixels"), numbers * pixels + np.arange(pixels)) < chances)
    images = np.concatenate(found) if found else np.zeros((0, pixels), bool)
    shaped = images.reshape(len(images), config.num_channels, config.image_size, config.image_size)
    return np.ascontiguousarray(shaped.transpose(0, 2, 3, 1)).astype(np.uint8) * np.uint8(255)
