"""Which layer of the small model each layer of the deep one comes from: pure functions of two counts ("Stacking Your Transformers", section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cairn.errors import InputError


def stacked(small: int, deep: int) -> list[int]:
    """The whole model again and again: 0 1 2 0 1 2."""
    return [i % small for i in range(deep)]


def interleaved(small: int, deep: int) -> list[int]:
    """Each layer several times in place: 0 0 1 1 2 2."""
    return [i * small // deep for i in range(deep)]


def overlapped(small: int, deep: int) -> list[int]:
    """Two copies, of which the first lacks its last layers and the second its first: 0 1 2 1 2 3 ("SOLAR 10.7B", section 2)."""
    each = deep // 2
    if deep % 2 or each > small:
        raise InputError(f"order=solar joins two equal parts of the {small} layers: {deep} layers are not an even number of at most {2 * small}.")
    return [*range(each), *range(small - each, small)]


def extended(small: int, deep: int) -> list[int]:
    """The last layers once more: 0 1 2 3 2 3."""
    if deep > 2 * small:
        raise InputError(f"order=short repeats the last layers once: {deep} layers are more than twice {small}.")
    return [*range(small), *range(2 * small - deep, small)]


ORDERS: dict[str, Callable[[int, int], list[int]]] = {"stack": stacked, "interleave": interleaved, "solar": overlapped, "short": extended}


def added(order: Sequence[int]) -> list[bool]:
    """For each layer of the deep model whether it is a further copy; the first one of each small layer counts as that layer itself."""
    return [layer in order[:i] for i, layer in enumerate(order)]
