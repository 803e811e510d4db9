"""What all averages have in common beyond the mean: heads, BatchNorm statistics, and the optimizer's moments.

Bodies trained from one start lie near each other; heads that were initialized independently do not, and their mean is
nobody's head. So a head is averaged with the rest, required to be shared, or taken from one checkpoint alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch

from cairn.checkpoint.format.dtypes import DTYPES
from cairn.checkpoint.format.layout import TensorSpec
from cairn.checkpoint.format.lazy import LazyTensor
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating.stream import OPTIMIZER, Tensorwise
from cairn.checkpoint.operating.walk import Walk
from cairn.errors import InputError, MismatchError
from cairn.merging.batch_norm import is_counter, is_statistic, mean_beside, pooled_variance


class Averaged(Tensorwise):
    """Base of averages: every tensor of the body, and the head as `heads` says."""

    elementwise: ClassVar[bool] = True

    heads: Literal["averaged", "shared", "first"] = "averaged"
    """`averaged` like all else; `shared`: refuse checkpoints whose heads differ; `first`: the first checkpoint's, the body averaged."""
    head: list[str] = ["lm_head.*", "score.*", "classifier.*", "head.*"]
    """Patterns of the names of a head's tensors."""
    integers: Literal["equal", "last"] = "equal"
    """Counters and other integers: must be equal in all, or are the last checkpoint's (as a BatchNorm's counter of batches always is)."""
    batch_norm: Literal["pooled", "last", "averaged"] = "pooled"
    """Running statistics: of the pooled data, the last checkpoint's, or averaged like weights."""
    moments: Literal["dropped", "averaged"] = "dropped"
    """The optimizer's state: dropped, or its moments averaged like the weights; the rest of the training state is then the last checkpoint's."""

    @abstractmethod
    def mean_of(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The average of tensors of one shape."""

    def check(self, parents: Sequence[Checkpoint]) -> None:
        super().check(parents)
        if self.moments == "averaged":
            _refuse_other_moments(parents)
        if self.heads == "averaged":
            return
        found = [name for name in parents[0].tensors if self.is_head(name)]
        if not found:
            raise InputError(f"heads={self.heads}: no tensor is named like a head ({', '.join(self.head)}); set head=[PATTERN].")
        for name in found if self.heads == "shared" else []:
            for other in parents[1:]:
                if not torch.equal(parents[0].tensors[name].load(), other.tensors[name].load()):
                    raise MismatchError(f"{parents[0].path} and {other.path} have different heads ('{name}'): average them with heads=first.")

    def carrier(self, name: str) -> int | None:
        if is_counter(name):
            return 0 if self.is_first(name) else -1
        return -1 if self.integers == "last" else None

    def is_head(self, name: str) -> bool:
        """Whether a tensor belongs to the head."""
        return any(fnmatchcase(name, pattern) for pattern in self.head)

    def is_first(self, name: str) -> bool:
        """Whether a tensor is the first checkpoint's as it is: of a head that is not averaged."""
        return self.heads != "averaged" and self.is_head(name)

    def combine(self, name: str, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        if self.is_first(name):
            return inputs[0]
        return inputs[-1] if self.batch_norm == "last" and is_statistic(name) else self.mean_of(inputs)

    def beside(self, name: str, tensors: Mapping[str, LazyTensor]) -> Sequence[str]:
        mean = mean_beside(name, tensors)
        if mean is None or self.batch_norm != "pooled" or self.is_first(name):
            return ()
        return [mean] if tensors[mean].shape == tensors[name].shape else ()

    def combine_beside(self, name: str, inputs: Sequence[torch.Tensor], beside: Mapping[str, Sequence[torch.Tensor]]) -> torch.Tensor:
        ((_, means),) = beside.items()
        return pooled_variance(inputs, means, self.mean_of)

    # -- moments ------------------------------------------------------------------------------------------------

    def continues(self) -> int | None:
        return -1 if self.moments == "averaged" else None

    def changes(self, parents: Sequence[Checkpoint]) -> list[str]:
        return ["optimizer state: kept -> moments averaged, the rest of the last parent"] if self.moments == "averaged" else []

    def state_pieces(self, stem: str, spec: TensorSpec, parents: Sequence[Checkpoint]) -> Iterator[torch.Tensor]:
        if stem != OPTIMIZER or not _is_moment(spec, parents[-1]):
            yield from super().state_pieces(stem, spec, parents)
            return
        for piece in Walk(parents, [spec], stem=OPTIMIZER).pieces():
            yield self.combine(spec.name.rpartition("/")[0], piece.inputs)  # as the weight that it belongs to


def _is_moment(spec: TensorSpec, parent: Checkpoint) -> bool:
    """Whether a tensor of an optimizer's state is a mean over gradients; what is no moment counts steps."""
    owner, _, key = spec.name.rpartition("/")
    scalar = not spec.shape and parent.tensors[owner].shape != ()
    return DTYPES[spec.dtype].is_floating_point and key != "step" and not scalar


def _refuse_other_moments(parents: Sequence[Checkpoint]) -> None:
    """Moments can be averaged where all parents keep the same ones, each for one of the weights."""
    kept = []
    for parent in parents:
        if parent.optimizer is None:
            raise InputError(f"{parent.path} holds no optimizer state, so moments cannot be averaged; leave moments=averaged out.")
        kept.append({name: tensor.shape for name, tensor in parent.optimizer.items()})
        if differing := sorted(set(kept[-1].items()) ^ set(kept[0].items())):
            raise MismatchError(f"{parents[0].path} and {parent.path} keep different optimizer state: '{differing[0][0]}' is not the same in both.")
    for name in kept[0]:
        if name.rpartition("/")[0] not in parents[0].tensors:
            raise MismatchError(f"{parents[0].path} keeps '{name}' for a weight that it does not hold, so moments cannot be averaged.")
