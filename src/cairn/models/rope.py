"""Rotary positions and their scaling variants, in float32 throughout.

Sources: "RoFormer" (2104.09864); linear and dynamic: position interpolation and NTK-aware scaling as transformers
computes them; "YaRN" (2309.00071); "LongRoPE" (2402.13753); llama3: the frequency rule published with Llama 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Rotation(Protocol):
    """What the angles of positions follow; every decoder's architecture has it."""

    @property
    def rotary_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def rope_scaling(self) -> dict[str, Any] | None: ...


TABLE = 8192
"""Positions whose angles are kept ready; others are computed when they are asked for."""


def _powers(base: float, size: int) -> Tensor:
    """base^(2i/size) for each pair of a head, float32 (size/2,)."""
    return base ** (torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size)


def frequencies(architecture: Rotation, length: int) -> tuple[Tensor, float]:
    """Angle per position of each pair of a head, float32 (head_dim/2,), and the factor on cosine and sine.

    `length` is the length of the sequence, on which `dynamic` and `longrope` depend.
    """
    scaling = architecture.rope_scaling or {"rope_type": "default"}
    return _TYPES[scaling["rope_type"]](architecture, scaling, length)


def _default(a: Rotation, scaling: dict[str, Any], length: int) -> tuple[Tensor, float]:
    return 1.0 / _powers(a.rope_theta, a.rotary_size), 1.0


def _linear(a: Rotation, scaling: dict[str, Any], length: int) -> tuple[Tensor, float]:
    return 1.0 / _powers(a.rope_theta, a.rotary_size) / scaling["factor"], 1.0


def _dynamic(a: Rotation, scaling: dict[str, Any], length: int) -> tuple[Tensor, float]:
    size, longest, factor = a.rotary_size, a.max_position_embeddings, scaling["factor"]
    stretch = factor * max(length, longest) / longest - (factor - 1)
    return 1.0 / _powers(a.rope_theta * stretch ** (size / (size - 2)), size), 1.0


def _llama3(a: Rotation, scaling: dict[str, Any], length: int) -> tuple[Tensor, float]:
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    original = scaling.get("original_max_position_embeddings") or a.max_position_embeddings
    plain = 1.0 / _powers(a.rope_theta, a.rotary_size)
    turns = original * plain / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * plain / factor + blend * plain, 1.0


def _yarn(a: Rotation, scaling: dict[str, Any], length: int) -> tuple[Tensor, float]:
    original = scaling.get("original_max_position_embeddings") or a.max_position_embeddings
    factor, size = scaling["factor"], a.rotary_size

    def pair(turns: float) -> float:
        """The pair of dimensions that turns `turns` times within the original context."""
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(a.rope_theta))

    low, high = pair(scaling.get("beta_fast") or 32), pair(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = ((torch.arange(size // 2, dtype=torch.float32, device="cpu") - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    powers = _powers(a.rope_theta, size)
    return 1.0 / (factor * powers) * ramp + 1.0 / powers * (1 - ramp), _yarn_attention(scaling, factor)


def _yarn_attention(scaling: dict[str, Any], factor: float) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given, above, below = scaling.get("attention_factor"), scaling.get("mscale"), scaling.get("mscale_all_dim")
    if given is not None:
        return float(given)
    return mscale(above) / mscale(below) if above and below else mscale(1.0)


def _longrope(a: Rotation, scaling: dict[str, Any], length: int) -> tuple[Tensor, float]:
    original = scaling.get("original_max_position_embeddings") or a.max_position_embeddings
    factor = scaling.get("factor") or a.max_position_embeddings / original
    given = scaling.get("attention_factor")
    attention = given if given is not None else 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    stretch = torch.tensor(scaling["long_factor" if length > original else "short_factor"], dtype=torch.float32, device="cpu")
    return 1.0 / (stretch * _powers(a.rope_theta, a.rotary_size)), float(attention)


_TYPES: dict[str, Callable[[Rotation, dict[str, Any], int], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}


def steady_length(architecture: Rotation) -> int | None:
    """Up to which length a text may be read beside others in one row; None: any. Longer ones have angles that depend on their length, or
    windows that are counted in positions of the row."""
    limits = [window for window in getattr(architecture, "windows", ()) if window is not None]
    scaling = architecture.rope_scaling or {}
    if scaling.get("rope_type") in ("dynamic", "longrope"):
        original = scaling.get("original_max_position_embeddings") if scaling["rope_type"] == "longrope" else None
        limits.append(original or architecture.max_position_embeddings)
    return min(limits, default=None)


def angles(architecture: Rotation, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine at `positions` (...), float32 (..., head_dim/2), for a sequence of `length`."""
    rates, factor = frequencies(architecture, length)
    turned = positions[..., None].float() * rates.to(positions.device)
    return turned.cos() * factor, turned.sin() * factor


class Rope(nn.Module):
    """Cosines and sines of positions. Holds a float32 table of the first positions, which no change of dtype touches."""

    cos: Tensor
    sin: Tensor

    def __init__(self, architecture: Rotation) -> None:
        super().__init__()
        self.architecture = architecture
        self.size = min(architecture.max_position_embeddings, TABLE)
        self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("sin", torch.empty(0), persistent=False)
        self._fill(self.cos.device)

    def _fill(self, device: torch.device) -> None:
        if device.type == "meta":
            shape = (self.size, self.architecture.rotary_size // 2)
            self.cos, self.sin = torch.empty(shape, device=device), torch.empty(shape, device=device)
            return
        cos, sin = angles(self.architecture, torch.arange(self.size, device="cpu"), self.size)
        self.cos, self.sin = cos.to(device), sin.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rope:
        super()._apply(fn, recurse)  # moves the table; a dtype change or an empty allocation is undone by filling it again
        self._fill(self.cos.device)
        return self

    def forward(self, length: int, offset: int = 0, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cosine and sine (1 or B, length, 1, head_dim/2) of positions offset..offset+length, or of given `positions` (B, length)."""
        end = offset + length
        if positions is not None:
            cos, sin = angles(self.architecture, positions, end)
        elif end <= self.size and self._fits(end):
            cos, sin = self.cos[None, offset:end], self.sin[None, offset:end]
        else:
            cos, sin = angles(self.architecture, torch.arange(offset, end, device=self.cos.device)[None], end)
        return cos[:, :, None], sin[:, :, None]

    def _fits(self, end: int) -> bool:
        """Whether the table's frequencies are those of a sequence of `end`; only longrope changes within the table."""
        original = (self.architecture.rope_scaling or {}).get("original_max_position_embeddings") or self.architecture.max_position_embeddings
        longrope = (self.architecture.rope_scaling or {}).get("rope_type") == "longrope"
        return not longrope or (end > original) == (self.size > original)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + r/2) of the first r numbers of the heads of x (B, T, H, hd): the half-split layout of Hugging Face. The angles say
    r; the rest of a head stays as it is. Keeps x's dtype; computed in float32 at least, unless the angles come in a lower precision."""
    size = 2 * cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat((rotate(x[..., :size], cos, sin), x[..., size:]), dim=-1)
    wide = x if x.dtype == torch.float64 or cos.dtype.itemsize < 4 else x.float()
    first, second = wide.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
