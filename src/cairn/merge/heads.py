"""Averages of checkpoints whose task heads may or may not be aligned.

Bodies trained from one start lie near each other; heads that were initialised independently do not, and their mean is
nobody's head. So a head is averaged with the rest, required to be shared, or taken from one checkpoint alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch

from cairn.checkpoint.read import Checkpoint
from cairn.checkpoint.stream import Tensorwise
from cairn.errors import InputError, MismatchError


class Averaged(Tensorwise):
    """Base of averages: every tensor of the body, and the head as `heads` says."""

    elementwise: ClassVar[bool] = True

    heads: Literal["averaged", "shared", "first"] = "averaged"
    """`averaged` like all else; `shared`: refuse checkpoints whose heads differ; `first`: the first checkpoint's, the body averaged."""
    head: list[str] = ["lm_head.*", "score.*", "classifier.*", "head.*"]
    """Patterns of the names of a head's tensors."""
    integers: Literal["equal", "last"] = "equal"
    """Counters and other integers: must be equal in all, or are the last checkpoint's."""

    @abstractmethod
    def mean_of(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The average of tensors of one shape."""

    def check(self, parents: Sequence[Checkpoint]) -> None:
        super().check(parents)
        if self.heads == "averaged":
            return
        found = [name for name in parents[0].tensors if self.is_head(name)]
        if not found:
            raise InputError(f"heads={self.heads}: no tensor is named like a head ({', '.join(self.head)}); set head=[PATTERN].")
        for name in found if self.heads == "shared" else []:
            for other in parents[1:]:
                if not torch.equal(parents[0].tensors[name].load(), other.tensors[name].load()):
                    raise MismatchError(f"{parents[0].path} and {other.path} have different heads ('{name}'): average them with heads=first.")

    def carrier(self) -> int | None:
        return -1 if self.integers == "last" else None

    def is_head(self, name: str) -> bool:
        """Whether a tensor belongs to the head."""
        return any(fnmatchcase(name, pattern) for pattern in self.head)

    def combine(self, name: str, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return inputs[0] if self.heads != "averaged" and self.is_head(name) else self.mean_of(inputs)
