"""Parts of tensors: which box of a logical tensor a process holds, and which bytes of a file that is.

A part is an axis-aligned box. Whatever the layout of a job (data, shard, tensor parallel, or products of them), every
process can say which part of each tensor it holds; from that alone follow the byte ranges that it writes and reads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from cairn.errors import MismatchError

if TYPE_CHECKING:
    import torch


SHORT_RUN = 32 * 2**10
"""Bytes below which the runs of a part pass through a mapping of the file: a system call for each would cost more than the copy."""


@dataclass(frozen=True)
class Part:
    """The box of a tensor that begins at `offset` and has `shape`, one number per dimension."""

    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Items in it."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index into the whole tensor."""
        return tuple(slice(begin, begin + size) for begin, size in zip(self.offset, self.shape, strict=True))


class Span(NamedTuple):
    """`items` consecutive items: at `outer` in the whole tensor, at `inner` in the part, both in C order."""

    outer: int
    inner: int
    items: int


def spans(whole: Sequence[int], part: Part) -> Iterator[Span]:
    """The runs of consecutive items that a part of a tensor of shape `whole` consists of, in order."""
    if not part.count:
        return
    # Dimensions that the part covers whole, counted from the last, are joined with the one before them.
    joined = len(whole)
    while joined > 0 and part.shape[joined - 1] == whole[joined - 1]:
        joined -= 1
    leading = max(joined - 1, 0)
    run = math.prod(part.shape[leading:])
    strides = [math.prod(whole[axis + 1 :]) for axis in range(len(whole))]
    start = sum(begin * stride for begin, stride in zip(part.offset, strides, strict=True))
    for number, index in enumerate(itertools.product(*(range(size) for size in part.shape[:leading]))):
        yield Span(start + sum(i * stride for i, stride in zip(index, strides, strict=False)), number * run, run)


def boxes(name: str, whole: Sequence[int], begin: int, end: int, outer: tuple[int, ...] = ()) -> Iterator[Part]:
    """The boxes that items `begin` to `end` of a tensor of shape `whole` consist of, in C order: at most 2 x dimensions - 1."""
    if begin >= end:
        return
    ones = (1,) * len(outer)
    if not whole:
        yield Part(name, outer, ones)
        return
    row, inner = math.prod(whole[1:]), whole[1:]
    first, last = -(-begin // row), end // row
    if first > last:
        yield from boxes(name, inner, begin - last * row, end - last * row, (*outer, last))
        return
    if begin < first * row:
        yield from boxes(name, inner, begin - (first - 1) * row, row, (*outer, first - 1))
    if first < last:
        yield Part(name, (*outer, first, *(0 for _ in inner)), (*ones, last - first, *inner))
    if last * row < end:
        yield from boxes(name, inner, 0, end - last * row, (*outer, last))


def common(a: Part, b: Part) -> Part:
    """The box that two parts of one tensor share; empty where they do not meet."""
    begin = tuple(map(max, a.offset, b.offset))
    ends = (min(x + m, y + n) for x, m, y, n in zip(a.offset, a.shape, b.offset, b.shape, strict=True))
    return Part(a.name, begin, tuple(max(0, end - first) for first, end in zip(begin, ends, strict=True)))


def within(part: Part, box: Part) -> Part:
    """A part that lies in `box`, its offset counted from the box's beginning."""
    return Part(part.name, tuple(a - b for a, b in zip(part.offset, box.offset, strict=True)), part.shape)


def in_short_rows(whole: Sequence[int], part: Part, item: int) -> bool:
    """Whether a part is columns of a matrix, so narrow that its rows are short runs; `item` is the bytes of one item."""
    return len(whole) == 2 and part.shape[1] < whole[1] and part.shape[1] * item < SHORT_RUN


def part_of(name: str, tensor: torch.Tensor) -> Part:
    """The part that this process holds of a tensor: all of a plain one, the local shard of a DTensor."""
    placed = _placed(tensor)
    if placed is None:
        return Part(name, (0,) * tensor.dim(), tuple(tensor.shape))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(placement.is_partial() for placement in placed.placements):
        raise MismatchError(f"'{name}' is a sum that is still to be made ({placed.placements}), which cannot be stored.")
    shape, offset = compute_local_shape_and_global_offset(placed.shape, placed.device_mesh, placed.placements)
    return Part(name, tuple(offset), tuple(shape))


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, as a plain one that shares its memory."""
    placed = _placed(tensor)
    local = tensor if placed is None else placed.to_local()
    return local.detach() if local.requires_grad else local


def is_sharded(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether some of these tensors are spread over processes, so that computing with them takes all of them together."""
    return any(_placed(tensor) is not None for tensor in tensors)


def _placed(tensor: torch.Tensor) -> torch.distributed.tensor.DTensor | None:
    import torch

    if type(tensor) in (torch.Tensor, torch.nn.Parameter) or not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    return tensor if isinstance(tensor, DTensor) else None


def owners(held: Sequence[Iterable[Part]], shapes: Mapping[str, Sequence[int]]) -> list[list[Part]]:
    """Who writes what: of the parts that each process holds, those that it writes, so that every item is written once.

    A part that several processes hold goes to the one of them with the least to write so far. The same everywhere, as
    the argument is. Raises `MismatchError` if the parts overlap or leave a gap.
    """
    holders: dict[Part, list[int]] = {}
    for rank, parts in enumerate(held):
        for part in parts:
            if part.count:
                holders.setdefault(part, []).append(rank)
    covered = dict.fromkeys(shapes, 0)
    for part in holders:
        covered[part.name] += part.count
    for name, shape in shapes.items():
        if covered[name] != math.prod(shape):
            raise MismatchError(f"The processes hold {covered[name]} of the {math.prod(shape)} items of '{name}'; parts overlap or are missing.")
    load, mine = [0] * len(held), [list[Part]() for _ in held]
    for part, ranks in sorted(holders.items(), key=lambda item: (-item[0].count, item[0].name, item[0].offset)):
        rank = min(ranks, key=lambda rank: (load[rank], rank))
        load[rank] += part.count
        mine[rank].append(part)
    return mine
