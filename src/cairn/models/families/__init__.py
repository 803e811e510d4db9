"""Families of models: one file each, registered in the catalog as kind 'architecture'."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cairn.models.config import Architecture

if TYPE_CHECKING:
    from torch import nn

    from cairn.models.decoder import Decoder


class DecoderFamily(Architecture):
    """A family that the one decoder (`cairn.models.decoder`) computes."""

    def network(self) -> Decoder:
        """The network, on the device of the surroundings."""
        from cairn.models.decoder import Decoder

        return Decoder(self)

    def meta_model(self) -> Decoder:
        """The network on the meta device: shapes and names, no memory."""
        import torch

        with torch.device("meta"):
            return self.network()

    def initialize(self, model: nn.Module, seed: int) -> None:
        """Draw the weights of a network of this architecture, wherever and in whatever parts they lie."""
        from cairn.models.decoder import initialize

        initialize(model, seed, self.initializer_range, self.initializer_cutoff)
