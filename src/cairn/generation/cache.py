"""Keys and values of the tokens already read, so that each new token costs one position instead of all."""

from __future__ import annotations

import torch
from torch import Tensor

from cairn.errors import InputError
from cairn.models.config import Architecture


class KeyValueCache:
    """Room for `capacity` tokens of a batch, allocated once; satisfies `models.decoder.Cache`."""

    def __init__(self, architecture: Architecture, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str) -> None:
        """Bytes: `architecture.cache_bytes(batch * capacity, dtype.itemsize)`."""
        shape = (architecture.num_hidden_layers, batch, architecture.key_value_heads, capacity, architecture.head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self._filled = [0] * architecture.num_hidden_layers

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    @property
    def length(self) -> int:
        """Tokens held after the last complete forward pass."""
        return self._filled[-1]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, Hkv, T, hd) of a layer; returns views of all that it holds. Raises `InputError` when full."""
        begin, end = self._filled[layer], self._filled[layer] + keys.shape[2]
        if end > self.capacity:
            raise InputError(f"The cache has room for {self.capacity} tokens and was given token {end}; allocate a larger one.")
        self.keys[layer, :, :, begin:end] = keys
        self.values[layer, :, :, begin:end] = values
        self._filled[layer] = end
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def place(self, row: int, keys: Tensor, values: Tensor, end: int) -> None:
        """Put keys and values (layers, Hkv, T, hd), computed elsewhere, in front of column `end` of a row."""
        begin = end - keys.shape[2]
        self.keys[:, row, :, begin:end] = keys
        self.values[:, row, :, begin:end] = values

    def hold(self, length: int) -> None:
        """From now on the first `length` columns count as held."""
        self._filled = [length] * len(self._filled)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch only."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
