"""Wanda: pruning by weights and activations.

    S_ij = |W_ij| * ||X_j||_2,   X_j the j-th input of the matrix over all tokens of the calibration texts

The weights of lowest S are set to zero, compared within each row of W (all weights of one output), or within each group of m consecutive
inputs of a row. Nothing is trained or updated. Blocks are pruned in turn, each with the inputs that the pruned ones before it give.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from cairn.catalog import Paper, register
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating.calibrated import Calibrated, Visit
from cairn.compression import Compression
from cairn.errors import InputError, MismatchError

ROWS = 256
"""Rows of a matrix that are ranked at a time."""


def scores(weight: Tensor, squares: Tensor) -> Tensor:
    """S (outputs, inputs) of a weight (outputs, inputs) and the sums of squares (inputs,) of what it reads; float32.

    Examples
    --------
    >>> scores(torch.tensor([[1.0, -2.0]]), torch.tensor([9.0, 1.0]))
    tensor([[3., 2.]])
    """
    return weight.float().abs() * squares.sqrt().float()


def pruned_by_row(score: Tensor, sparsity: float) -> Tensor:
    """The mask (outputs, inputs) of what goes: in each row the share `sparsity` of lowest score, the first of equals."""
    count = int(score.shape[1] * sparsity)
    mask = torch.zeros_like(score, dtype=torch.bool)
    if count:
        lowest = torch.sort(score, dim=1, stable=True).indices[:, :count]
        mask.scatter_(1, lowest, True)
    return mask


def pruned_by_group(score: Tensor, kept: int, group: int) -> Tensor:
    """The mask of what goes: all but the `kept` of highest score in each group of consecutive inputs, the first of equals."""
    outputs, inputs = score.shape
    grouped = score.reshape(outputs, inputs // group, group)
    lowest = torch.sort(grouped, dim=2, stable=True).indices[..., : group - kept]
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(2, lowest, True).reshape(outputs, inputs)


@register("compression", "wanda", paper=Paper("A Simple and Effective Pruning Approach for Large Language Models", "arXiv:2306.11695"))
class Wanda(Compression, Calibrated):
    """Prune the matrices of attention and MLP by |weight| times the norm of its input, without training (section 3)."""

    sparsity: float = Field(0.5, ge=0, lt=1)
    """Share of each row that is set to zero. With a `pattern` the pattern says it."""
    pattern: str | None = None
    """`2:4` keeps at most 2 of each 4 consecutive inputs, `4:8` 4 of 8; default: no pattern."""
    targets: list[Literal["q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"]] = ["q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"]
    """Which matrices of each block; embedding, head and norms are never pruned."""

    @field_validator("pattern", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        # YAML reads 2:4 as the number 124 in base 60.
        return f"{value // 60}:{value % 60}" if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _known_pattern(self) -> Wanda:
        if self.pattern is not None:
            match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", self.pattern)
            if match is None or int(match[1]) >= int(match[2]):
                raise ValueError(f"pattern is written n:m with n smaller than m, for example 2:4, not '{self.pattern}'.")
        return self

    def share(self) -> float:
        """The share of each row that goes."""
        if self.pattern is None:
            return self.sparsity
        kept, group = self._pattern()
        return 1 - kept / group

    def check(self, parents: Sequence[Checkpoint]) -> None:
        if not self.targets:
            raise InputError("targets names no matrices, so nothing would be pruned.")
        super().check(parents)

    def changes(self, parents: Sequence[Checkpoint]) -> list[str]:
        said = f"in the pattern {self.pattern}" if self.pattern is not None else "of lowest score in each row"
        return [f"{', '.join(self.targets)} of every block: {self.share():.0%} of the weights {said} -> 0"]

    def visit(self, parent: Checkpoint, matrices: Mapping[str, Any], parts: Mapping[str, str]) -> Visit:
        chosen = {name: matrix for name, matrix in matrices.items() if parts[name] in self.targets}
        if not {"up", "gate_up"} & set(parts.values()):
            raise MismatchError(f"{parent.path}: its MLPs are no single matrices (a mixture of experts?), which wanda does not prune.")
        if self.pattern is not None:
            _, group = self._pattern()
            odd = next((name for name, matrix in chosen.items() if matrix.inputs % group), None)
            if odd is not None:
                raise MismatchError(f"{parent.path}: '{odd}' has {chosen[odd].inputs} inputs, which the pattern {self.pattern} does not divide.")
        return _Pruning(self, chosen)

    def mask(self, score: Tensor) -> Tensor:
        """What goes."""
        return pruned_by_row(score, self.sparsity) if self.pattern is None else pruned_by_group(score, *self._pattern())

    def _pattern(self) -> tuple[int, int]:
        kept, _, group = str(self.pattern).partition(":")
        return int(kept), int(group)


class _Pruning(Visit):
    """One block: sums of squares of what its matrices read, then the masks."""

    def __init__(self, method: Wanda, matrices: Mapping[str, Any]) -> None:
        self.method, self.matrices = method, matrices
        self.squares: dict[str, Tensor] = {}

    def observe(self, weight: str, inputs: Tensor) -> None:
        if weight in self.matrices:
            found = inputs.reshape(-1, inputs.shape[-1]).float().square().sum(0).double()
            self.squares[weight] = found if weight not in self.squares else self.squares[weight] + found

    def decide(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        found = {}
        for name, matrix in self.matrices.items():
            weight = weights[name].t() if matrix.transposed else weights[name]
            # A few rows at a time: sorting takes three times the memory of what is sorted.
            pruned = torch.cat([rows.masked_fill(self.method.mask(scores(rows, self.squares[name])), 0.0) for rows in weight.split(ROWS)])
            found[name] = pruned.t().contiguous() if matrix.transposed else pruned
        return found
