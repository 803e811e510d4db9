"""How tensors were cut over ranks, as pure functions: each rule joins the pieces of all ranks and cuts the whole again.

`union` takes the pieces in the order of ranks; `split` is its inverse. Both also work on tensors of the meta device, which
have shapes and no values: a plan is the same computation without the bytes. In doubt a rule refuses; it never guesses.
Source: "Universal Checkpointing: Efficient and Flexible Checkpointing for Large Scale Distributed Training" (patterns).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from cairn.errors import InputError, MismatchError

Uneven = Literal["ceil", "balanced"]


def widths_of(size: int, ways: int, uneven: Uneven) -> list[int]:
    """The widths of `size` rows cut in `ways`: 10 over 4 is 3, 3, 3, 1 by `ceil` (torch.chunk, DTensor), 3, 3, 2, 2 by `balanced`
    (DeepSpeed's AutoTP)."""
    if uneven == "balanced":
        return [size // ways + (rank < size % ways) for rank in range(ways)]
    block = -(-size // ways)
    return [max(0, min(block, size - rank * block)) for rank in range(ways)]


class Rule(ABC):
    """How one tensor lies over the ranks of one axis."""

    @abstractmethod
    def union(self, name: str, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole tensor from the pieces of ranks 0, 1, ... Raises `MismatchError` where they cannot have come from this rule."""

    @abstractmethod
    def split(self, name: str, whole: torch.Tensor, ways: int) -> list[torch.Tensor]:
        """The pieces of `ways` ranks. Raises `InputError` where the rule does not say how to cut so many ways."""


@dataclass(frozen=True)
class Unique(Rule):
    """One rank holds it."""

    def union(self, name: str, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        if len(pieces) != 1:
            raise MismatchError(f"'{name}' should be held by one rank and {len(pieces)} hold a piece of it.")
        return pieces[0]

    def split(self, name: str, whole: torch.Tensor, ways: int) -> list[torch.Tensor]:
        if ways != 1:
            raise InputError(f"'{name}' belongs to one rank and cannot be cut for {ways}.")
        return [whole]


@dataclass(frozen=True)
class Replicated(Rule):
    """Every rank holds the same value, bit for bit. Tensors tied over pipeline stages are such copies, too."""

    over: str = "ranks"

    def union(self, name: str, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        first = pieces[0]
        for rank, other in enumerate(pieces[1:], 1):
            if other.shape != first.shape or other.dtype != first.dtype or not _same_bits(first, other):
                raise MismatchError(
                    f"'{name}' is said to be the same on all {self.over}, and the copy of number {rank} differs from the first; "
                    "if the copies drifted apart in training, list it under 'average'."
                )
        return first

    def split(self, name: str, whole: torch.Tensor, ways: int) -> list[torch.Tensor]:
        return [whole] * ways


@dataclass(frozen=True)
class AveragedCopies(Rule):
    """Copies that were trained apart: their arithmetic mean, summed in float64."""

    def union(self, name: str, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        _same_shapes(name, pieces, "averaged")
        if not pieces[0].dtype.is_floating_point:
            return Replicated().union(name, pieces)
        total = pieces[0].double()
        for piece in pieces[1:]:
            total = total + piece
        return (total / len(pieces)).to(pieces[0].dtype)

    def split(self, name: str, whole: torch.Tensor, ways: int) -> list[torch.Tensor]:
        return [whole] * ways


def spread(pieces: Sequence[torch.Tensor]) -> float:
    """How far copies drifted apart: the largest distance from their mean, relative to the largest value."""
    mean = sum((piece.double() for piece in pieces[1:]), pieces[0].double()) / len(pieces)
    largest = max(float((piece - mean).abs().max()) if piece.numel() else 0.0 for piece in pieces)
    return largest / max(float(mean.abs().max()) if mean.numel() else 0.0, torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class Shard(Rule):
    """Each rank holds consecutive rows (`dim` 0) or columns (1).

    `uneven` records the convention of a cut that is not even; without it such a cut is refused. `vocab` is the number of
    real rows of a vocabulary that was padded until it could be cut evenly: the padding is dropped, and made again by `split`.
    """

    dim: int = 0
    uneven: Uneven | None = None
    vocab: int | None = None

    def union(self, name: str, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        self._check(name, pieces)
        whole = torch.cat(list(pieces), self.dim) if len(pieces) > 1 else pieces[0]
        if self.vocab is None:
            return whole
        if whole.shape[0] < self.vocab:
            raise MismatchError(f"'{name}' has {whole.shape[0]} rows, fewer than the vocabulary of {self.vocab}.")
        return whole[: self.vocab]

    def _check(self, name: str, pieces: Sequence[torch.Tensor]) -> None:
        _same_elsewhere(name, pieces, self.dim)
        widths = [piece.shape[self.dim] for piece in pieces]
        if len(set(widths)) > 1 and self.uneven is None:
            raise MismatchError(
                f"'{name}' is cut unevenly along dimension {self.dim} ({', '.join(map(str, widths))}) and nothing records by which rule; "
                "say uneven: ceil or uneven: balanced for it in the spec."
            )
        if self.uneven is not None and widths != (expected := widths_of(sum(widths), len(widths), self.uneven)):
            raise MismatchError(f"'{name}' is cut as {widths} along dimension {self.dim}; the rule '{self.uneven}' would have cut it as {expected}.")

    def split(self, name: str, whole: torch.Tensor, ways: int) -> list[torch.Tensor]:
        if self.vocab is not None:
            local = -(-self.vocab // ways)
            whole = torch.cat([whole, whole.new_zeros(local * ways - self.vocab, *whole.shape[1:])])
        size = whole.shape[self.dim]
        if size % ways and self.uneven is None:
            raise InputError(f"'{name}' has {size} items along dimension {self.dim}, which {ways} ranks cannot share evenly; record uneven: ceil or balanced.")
        return list(whole.split(widths_of(size, ways, self.uneven or "ceil"), self.dim))


@dataclass(frozen=True)
class Fused(Rule):
    """Several matrices stored as one, each of them cut over the ranks: gate and up, or query, key and value.

    `parts` counts equal ones, cut evenly. `widths[s][r]` is the width of sub-tensor s on rank r where they are unequal or cut
    unevenly; a rank may own nothing of one.
    """

    parts: int | None = None
    widths: tuple[tuple[int, ...], ...] | None = None
    dim: int = 0

    def union(self, name: str, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        _same_elsewhere(name, pieces, self.dim)
        widths = self._widths_of_pieces(name, pieces)
        cut = [piece.split([sub[rank] for sub in widths], self.dim) for rank, piece in enumerate(pieces)]
        return torch.cat([part[index] for index in range(len(widths)) for part in cut], self.dim)

    def _widths_of_pieces(self, name: str, pieces: Sequence[torch.Tensor]) -> Sequence[Sequence[int]]:
        sizes = [piece.shape[self.dim] for piece in pieces]
        if self.widths is None:
            assert self.parts is not None
            if len(set(sizes)) > 1 or sizes[0] % self.parts:
                raise MismatchError(f"'{name}' holds {self.parts} fused parts in pieces of {sizes}, which is no even cut; record their widths in the spec.")
            return [[size // self.parts for size in sizes]] * self.parts
        self._check_ranks(name, len(pieces), MismatchError)
        for rank, size in enumerate(sizes):
            recorded = sum(sub[rank] for sub in self.widths)
            if recorded != size:
                raise MismatchError(f"'{name}': rank {rank} holds {size} along dimension {self.dim}, and the recorded widths add up to {recorded}.")
        return self.widths

    def _check_ranks(self, name: str, ranks: int, error: type[InputError]) -> None:
        assert self.widths is not None
        if any(len(sub) != ranks for sub in self.widths):
            raise error(f"'{name}': the recorded widths are for {len(self.widths[0])} ranks, not for {ranks}.")

    def split(self, name: str, whole: torch.Tensor, ways: int) -> list[torch.Tensor]:
        size = whole.shape[self.dim]
        if self.widths is not None:
            self._check_ranks(name, ways, InputError)
            widths = self.widths
        else:
            assert self.parts is not None
            if size % (self.parts * ways):
                raise InputError(f"'{name}' of {size} cannot be cut evenly into {self.parts} parts for {ways} ranks; record their widths in the spec.")
            widths = ((size // self.parts // ways,) * ways,) * self.parts
        subs = whole.split([sum(sub) for sub in widths], self.dim)
        cut = [sub.split(list(width), self.dim) for sub, width in zip(subs, widths, strict=True)]
        return [torch.cat([sub[rank] for sub in cut], self.dim) for rank in range(ways)]


@dataclass(frozen=True)
class Expert(Rule):
    """Dimension 0 counts the `count` experts, which the ranks of the expert axis share evenly.

    `dim` is the dimension along which tensor-parallel ranks cut every expert; without it they must not have.
    """

    count: int
    dim: int | None = None

    @property
    def within(self) -> Rule:
        """How the tensor-parallel ranks of one expert rank hold it."""
        return Unique() if self.dim is None else Shard(self.dim)

    def union(self, name: str, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        _same_shapes(name, pieces, "joined as experts")
        whole = torch.cat(list(pieces)) if len(pieces) > 1 else pieces[0]
        if whole.shape[0] != self.count:
            raise MismatchError(f"'{name}' holds {whole.shape[0]} experts, the spec says {self.count}.")
        return whole

    def split(self, name: str, whole: torch.Tensor, ways: int) -> list[torch.Tensor]:
        if self.count % ways:
            raise InputError(f"'{name}': {ways} ranks cannot share {self.count} experts evenly.")
        return list(whole.split(self.count // ways))


@dataclass(frozen=True)
class Unsupported(Rule):
    """A layout that cannot be described; it is refused with the reason."""

    reason: str

    def union(self, name: str, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        raise InputError(f"'{name}' cannot be imported: {self.reason}.")

    def split(self, name: str, whole: torch.Tensor, ways: int) -> list[torch.Tensor]:
        raise InputError(f"'{name}' cannot be cut: {self.reason}.")


# -- cuts over data-parallel ranks: each rank holds a stretch of a flattened buffer ------------------------------------


def join_flat(name: str, stretches: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """`flat_group`, `flat_param`: consecutive stretches of one flattened tensor, without padding, in the order of ranks."""
    held, wanted = sum(stretch.numel() for stretch in stretches), math.prod(shape)
    if held != wanted:
        raise MismatchError(f"'{name}' has {wanted} items and the ranks hold {held} of them; a rank's file is missing or of another save.")
    return torch.cat([stretch.reshape(-1) for stretch in stretches]).reshape(tuple(shape))


def flat_group_cut(sizes: Sequence[int], ways: int, align: int = 1) -> list[list[tuple[int, int, int]]]:
    """`flat_group` (ZeRO-1 and 2): tensors of `sizes` items lie end to end in one buffer, padded to `align` items a rank and cut evenly.

    For each rank its (tensor, begin, end) stretches, in items of the tensor.
    """
    local = -(-sum(sizes) // (ways * align)) * align
    cut: list[list[tuple[int, int, int]]] = [[] for _ in range(ways)]
    start = 0
    for index, size in enumerate(sizes):
        for rank in range(start // local if local else 0, ways):
            begin, end = max(start, rank * local), min(start + size, (rank + 1) * local)
            if begin < end:
                cut[rank].append((index, begin - start, end - start))
        start += size
    return cut


def flat_param_stretch(numel: int, rank: int, ways: int) -> tuple[int, int]:
    """`flat_param` (ZeRO-3, FSDP1): begin and end of the real items that a rank holds of a flattened tensor; the rest of its
    ceil(numel / ways) items is padding."""
    block = -(-numel // ways)
    return min(rank * block, numel), min((rank + 1) * block, numel)


def flat_param_split(whole: torch.Tensor, ways: int) -> list[torch.Tensor]:
    """Every rank's piece of a flattened tensor, zero-padded to equal lengths."""
    block, flat = -(-whole.numel() // ways), whole.reshape(-1)
    return list(torch.cat([flat, flat.new_zeros(block * ways - flat.numel())]).split(block)) if block else [flat] * ways


def flat_param_union(name: str, pieces: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """The tensor from every rank's padded piece. Raises `MismatchError` where the pieces are not of the length that the cut gives."""
    numel, ways = math.prod(shape), len(pieces)
    block = -(-numel // ways)
    if any(piece.numel() != block for piece in pieces):
        raise MismatchError(f"'{name}' of {numel} items over {ways} ranks should lie in pieces of {block}, not of {[piece.numel() for piece in pieces]}.")
    stretches = [flat_param_stretch(numel, rank, ways) for rank in range(ways)]
    return join_flat(name, [piece.reshape(-1)[: end - begin] for piece, (begin, end) in zip(pieces, stretches, strict=True)], shape)


def _same_bits(first: torch.Tensor, other: torch.Tensor) -> bool:
    if first.is_meta or other.is_meta:
        return True
    return torch.equal(first.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))


def _same_shapes(name: str, pieces: Sequence[torch.Tensor], what: str) -> None:
    if any(piece.shape != pieces[0].shape or piece.dtype != pieces[0].dtype for piece in pieces):
        raise MismatchError(f"The pieces of '{name}' cannot be {what}: their shapes are {[tuple(piece.shape) for piece in pieces]}.")


def _same_elsewhere(name: str, pieces: Sequence[torch.Tensor], dim: int) -> None:
    """The pieces may differ in size along `dim` alone."""
    if any(not 0 <= dim < piece.dim() for piece in pieces):
        raise MismatchError(f"'{name}' has {pieces[0].dim()} dimension(s) and cannot be joined along dimension {dim}; correct its rule in the spec.")
    others = {(piece.dtype, *piece.shape[:dim], None, *piece.shape[dim + 1 :]) for piece in pieces}
    if len(others) > 1:
        raise MismatchError(
            f"The pieces of '{name}' differ in more than dimension {dim} ({[tuple(piece.shape) for piece in pieces]}); correct its rule in the spec."
        )
