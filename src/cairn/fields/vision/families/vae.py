"""Variational autoencoders over the pixels of an image: what an image was most probably made from, and how it is made from that.

q(z | x) = N(m(x), s(x)^2)        p(x | z): one probability for each pixel        z ~ N(0, 1) where an image is drawn
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from cairn.catalog import Paper, register
from cairn.fields.vision.families import ImageNetwork
from cairn.models.portrait import AUTOENCODER, Portrait

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cairn.fields.vision.autoencoder import Autoencoder


@register("architecture", "vae", paper=Paper("Auto-Encoding Variational Bayes", "arXiv:1312.6114"))
class Vae(ImageNetwork):
    """A variational autoencoder with hidden layers on either side of its latents (section 3 and appendix C); transformers knows no such family."""

    model_type: ClassVar[str] = "vae"
    hf_class: ClassVar[str] = "VariationalAutoencoder"
    portrait: ClassVar[Portrait] = AUTOENCODER
    measurement: ClassVar[str | None] = "elbo"

    hidden_sizes: list[int] = Field([256], min_length=1)
    """Width of each hidden layer of the encoder, first to last; the decoder has them the other way round."""
    latent_size: int = Field(16, ge=1)
    """Latents of one image."""

    initializer_gain: float = Field(2**0.5, gt=0)
    """Standard deviation with which a weight begins, times the root of the inputs of its layer: the root of 2 suits rectifiers, 0.58 is torch's own."""

    @property
    def encoder_widths(self) -> list[int]:
        """From the pixels to the mean and the logarithm of the variance of each latent."""
        return [self.num_channels * self.image_size**2, *self.hidden_sizes, 2 * self.latent_size]

    @property
    def decoder_widths(self) -> list[int]:
        """From the latents to the pixels."""
        return [self.latent_size, *reversed(self.hidden_sizes), self.num_channels * self.image_size**2]

    def _layers(self) -> list[tuple[int, int]]:
        return [*pairwise(self.encoder_widths), *pairwise(self.decoder_widths)]

    def parameter_count(self) -> int:
        return sum((wide + 1) * narrow for wide, narrow in self._layers())

    def outputs(self) -> list[dict[str, Any]]:
        one, latent = "one picture of the batch", ["batch", "latent"]
        pixels = {"name": "logits", "dtype": "float32", "shape": ["batch", "channels", "height", "width"], "axes": [one, "channel", "row", "column"]}
        return [
            pixels | {"units": "log odds of each pixel; their sigmoid is its share of full brightness"},
            {"name": "mean", "dtype": "float32", "shape": latent, "axes": [one, "latent"], "units": "mean of a normal distribution"},
            {"name": "log_variance", "dtype": "float32", "shape": latent, "axes": [one, "latent"], "units": "natural logarithm of its variance"},
        ]

    def scores(self, model: nn.Module, pixel_values: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
        return model(pixel_values).mean[0], [f"latent {number}" for number in range(self.latent_size)]

    def image_flops(self) -> int:
        return 2 * sum(wide * narrow for wide, narrow in self._layers())

    def activation_bytes(self, images: int, precision: str) -> int:
        return images * (2 if precision == "bfloat16" else 4) * 2 * (sum(self.encoder_widths) + sum(self.decoder_widths))

    def to_hf(self) -> dict[str, Any]:
        values = {"architectures": [self.hf_class], "model_type": self.model_type, **self.model_dump(mode="json"), "dtype": "float32", "torch_dtype": "float32"}
        return dict(sorted(values.items()))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """From the content of a config.json of this family."""
        return cls.parse({key: value for key, value in config.items() if key in cls.model_fields}, f"config.json of a '{cls.model_type}' model")

    def meta_model(self) -> Autoencoder:
        import torch

        from cairn.fields.vision.autoencoder import Autoencoder

        with torch.device("meta"):
            return Autoencoder(self)

    def initialize(self, model: nn.Module, seed: int) -> None:
        """Each matrix by what it reads: N(0, gain^2 / inputs); biases 0."""
        from cairn.models.decoder import initialize

        inputs = {name: parameter.shape[1] for name, parameter in model.named_parameters() if parameter.ndim == 2}
        initialize(model, seed, lambda name: self.initializer_gain / inputs[name] ** 0.5)
