"""What an adapter adds to one matrix, as a module beside it; and dropout whose masks do not depend on the layout of a run."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cairn.checkpoint.format.parts import local_of, part_of
from cairn.errors import InputError
from cairn.models.anatomy import Matrix

_GAMMA, _M1, _M2 = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""The constants of `cairn.randomness`, as signed numbers."""


class AdapterLayer(nn.Module):
    """Base of what adapters add to one matrix: `forward` gives the change of its output, `delta` the change of the matrix itself."""

    files: ClassVar[dict[str, str]]
    """Parameters of this layer and what they are called in a file, behind the name of the matrix."""

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        self.outputs, self.inputs = matrix.outputs, matrix.inputs
        self.merged: Tensor | None = None
        """The matrix as it was, while the change is part of it."""
        self.stream: Tensor | None = None
        """Seed of this step's dropout in this layer; None draws from torch's generator."""
        self.samples: Tensor | None = None
        """Global indices of the samples that the rows of the next forward pass are."""

    @abstractmethod
    def delta(self) -> Tensor:
        """The change of the matrix (outputs, inputs)."""

    @abstractmethod
    def draw(self, name: str, seed: int) -> None:
        """Draw the first values, each parameter from its own stream of (seed, name); shards take their part of what one process would draw."""

    def cut(self, mesh: Any, along: str) -> None:
        """Lay the parameters over the processes of tensor parallelism, which cut the matrix along its `outputs` or its `inputs`."""
        raise InputError("This adapter does not know how to be cut over parallel.tensor processes; use parallel.shard, which cuts anything.")

    def dropped(self, x: Tensor, share: float) -> Tensor:
        """x (B, ..., inputs) with a `share` of its items set to zero in training, and the others scaled up."""
        if not self.training or not share:
            return x
        if self.stream is None or self.samples is None or len(self.samples) != x.shape[0]:
            return F.dropout(x, share)
        local, offset = _local(x)
        kept = drawn(self.stream, self.samples, tuple(x.shape[1:]), share)
        mask = kept[..., offset : offset + local.shape[-1]].to(local.dtype) / (1 - share)
        if local is x:
            return x * mask
        return type(x).from_local(local * mask, x.device_mesh, x.placements)  # type: ignore[attr-defined]


@torch.no_grad()
def drawn_uniform(parameter: Tensor, name: str, seed: int, bound: float) -> None:
    """Draw a parameter uniformly from [-bound, bound), from its own stream of (seed, name); a shard takes its part of the whole."""
    local, part = local_of(parameter), part_of(name, parameter)
    stream = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest(), "big")
    whole = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    whole.uniform_(-bound, bound, generator=torch.Generator("cpu").manual_seed(stream))
    local.copy_(whole[part.slices])


def drawn(stream: Tensor, samples: Tensor, shape: tuple[int, ...], share: float) -> Tensor:
    """Which items (B, *shape) of the samples (B,) are kept, each with probability 1 - `share`: a number computed from (stream, sample, place)
    alone, the one that `cairn.randomness.bits` gives."""
    size = 1
    for extent in shape:
        size *= extent
    places = torch.arange(size, dtype=torch.int64, device=samples.device).view(shape)
    counters = samples.view(-1, *(1,) * len(shape)) * size + places
    bits = _mix(stream + (counters + 1) * _GAMMA)
    return _shifted(bits, 11) >= int(share * 2**53)


def _mix(values: Tensor) -> Tensor:
    values = (values ^ _shifted(values, 30)) * _M1
    values = (values ^ _shifted(values, 27)) * _M2
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, by: int) -> Tensor:
    """Unsigned shift to the right of signed numbers."""
    return (values >> by) & ((1 << (64 - by)) - 1)


def _local(x: Tensor) -> tuple[Tensor, int]:
    """What this process holds of x, and where that begins in the last dimension."""
    placements = getattr(x, "placements", None)
    if placements is None:
        return x, 0
    local: Tensor = x.to_local()  # type: ignore[attr-defined]
    cut = any(placement.is_shard() for placement in placements)
    return local, x.device_mesh.get_local_rank() * local.shape[-1] if cut else 0  # type: ignore[attr-defined]
