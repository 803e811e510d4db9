"""Counter-based random numbers: the value at a counter depends on the seed, a purpose and the counter alone.

No generator has to be carried along or resharded; any process can compute any value at any time, and the numbers are the
same on every machine for ever (they are defined here, not by a library's version). The mixing function is the
finaliser of SplitMix64 ("Fast splittable pseudorandom number generators", section 3.3), applied to keys made by blake3.
"""

from __future__ import annotations

import numpy as np
from blake3 import blake3
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_ROUNDS = 6
"""Feistel rounds; four give a pseudorandom permutation when the round function is, two more are margin."""


def seed_for(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose of a run, for example `seed_for(run_seed, "step", 17)`."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in (seed, *purpose))
    return int.from_bytes(blake3(text.encode()).digest(8), "little") >> 1


def bits(seed: int | Array, counters: ArrayLike) -> Array:
    """64 random bits for each counter (non-negative integers, any shape); `seed` may be many, of a shape that broadcasts."""
    with np.errstate(over="ignore"):
        return _mix(np.asarray(seed, np.uint64) + (np.asarray(counters).astype(np.uint64) + np.uint64(1)) * _GAMMA)


def uniform(seed: int | Array, counters: ArrayLike) -> NDArray[np.float64]:
    """A float in [0, 1) for each counter, with 53 random bits."""
    return (bits(seed, counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(seed: int | Array, counters: ArrayLike) -> NDArray[np.float64]:
    """A standard normal number for each counter, from two uniform ones (Box and Muller); the last bits are those of the machine's logarithm."""
    twice = 2 * np.asarray(counters).astype(np.uint64)
    return np.sqrt(-2 * np.log(1 - uniform(seed, twice))) * np.cos(2 * np.pi * uniform(seed, twice + np.uint64(1)))


def permutation(seed: int, size: int, indices: ArrayLike) -> NDArray[np.int64]:
    """Where a random permutation of range(size) sends each index; nothing of length `size` is ever made.

    A Feistel network permutes the smallest square of a power of two that holds `size`; values that fall outside are
    sent through again until they fall inside (cycle walking), which keeps it a bijection.
    """
    values = np.asarray(indices).astype(np.uint64)
    if values.size and int(values.max()) >= size:
        raise ValueError(f"an index lies outside range({size})")
    half = np.uint64(max(1, -(-(max(size - 1, 1)).bit_length() // 2)))
    keys = [np.uint64(seed_for(seed, "feistel", round_)) for round_ in range(_ROUNDS)]
    result = _feistel(values, half, keys)
    outside = result >= np.uint64(size)
    while outside.any():
        result[outside] = _feistel(result[outside], half, keys)
        outside = result >= np.uint64(size)
    return result.astype(np.int64)


def _feistel(values: Array, half: np.uint64, keys: list[np.uint64]) -> Array:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    with np.errstate(over="ignore"):
        for key in keys:
            left, right = right, left ^ (_mix(right * _GAMMA + key) & mask)
    return (left << half) | right


def _mix(values: Array) -> Array:
    values = (values ^ (values >> np.uint64(30))) * _M1
    values = (values ^ (values >> np.uint64(27))) * _M2
    return values ^ (values >> np.uint64(31))
