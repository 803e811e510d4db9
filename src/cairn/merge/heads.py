"""What all averages have in common beyond the mean: heads, BatchNorm statistics, and the optimizer's moments.

Bodies trained from one start lie near each other; heads that were initialised independently do not, and their mean is
nobody's head. So a head is averaged with the rest, required to be shared, or taken from one checkpoint alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch

from cairn.checkpoint.layout import TensorSpec
from cairn.checkpoint.read import Checkpoint
from cairn.checkpoint.stream import OPTIMIZER, Tensorwise
from cairn.checkpoint.walk import Walk
from cairn.errors import InputError, MismatchError
from cairn.merge.batch_norm import is_counter, mean_beside, pooled_variance


class Averaged(Tensorwise):
    """Base of averages: every tensor of the body, and the head as `heads` says."""

    elementwise: ClassVar[bool] = True

    heads: Literal["averaged", "shared", "first"] = "averaged"
    """`averaged` like all else; `shared`: refuse checkpoints whose heads differ; `first`: the first checkpoint's, the body averaged."""
    head: list[str] = ["lm_head.*", "score.*", "classifier.*", "head.*"]
    """Patterns of the names of a head's tensors."""
    integers: Literal["equal", "last"] = "equal"
    """Counters and other integers: must be equal in all, or are the last checkpoint's (as a BatchNorm's counter of batches always is)."""
    batch_norm: Literal["pooled", "averaged"] = "pooled"
    """Running variances: of the pooled data, or averaged like weights."""
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
        return -1 if self.integers == "last" or is_counter(name) else None

    def is_head(self, name: str) -> bool:
        """Whether a tensor belongs to the head."""
        return any(fnmatchcase(name, pattern) for pattern in self.head)

    def combine(self, name: str, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return inputs[0] if self.heads != "averaged" and self.is_head(name) else self.mean_of(inputs)

    def pieces(self, spec: TensorSpec, parents: Sequence[Checkpoint]) -> Iterator[torch.Tensor]:
        beside = mean_beside(spec.name, parents[0].tensors) if self.batch_norm == "pooled" else None
        if beside is None:
            yield from super().pieces(spec, parents)
            return
        means = Walk(parents, [parents[0].tensors[beside].spec])
        for variance, mean in zip(Walk(parents, [spec]).pieces(), means.pieces(), strict=True):
            yield pooled_variance(variance.inputs, mean.inputs, self.mean_of)

    # -- moments ------------------------------------------------------------------------------------------------

    def attachments(self, parents: Sequence[Checkpoint]) -> dict[str, list[TensorSpec]]:
        return {OPTIMIZER: [tensor.spec for tensor in (parents[-1].optimizer or {}).values()]} if self.moments == "averaged" else {}

    def documents(self, parents: Sequence[Checkpoint]) -> dict[str, Any]:
        plain = parents[-1].trainer
        return {"trainer.json": plain | {"events": {}}} if self.moments == "averaged" and plain is not None else {}

    def recipe(self, parents: Sequence[Checkpoint]) -> dict[str, Any] | None:
        origin = parents[-1].lineage
        return origin.options.get("recipe") if self.moments == "averaged" and origin is not None else None

    def changes(self, parents: Sequence[Checkpoint]) -> list[str]:
        return ["optimizer state: kept -> moments averaged, the rest of the last parent"] if self.moments == "averaged" else []

    def parts(self, spec: TensorSpec, parents: Sequence[Checkpoint], known: Any) -> Iterator[tuple[str, str, torch.Tensor]]:
        yield from super().parts(spec, parents, known)
        for name, tensor in ((parents[-1].optimizer or {}) if self.moments == "averaged" else {}).items():
            if name.rpartition("/")[0] != spec.name:
                continue
            if tensor.shape != spec.shape or not tensor.dtype.is_floating_point:  # a counter of steps, say
                yield OPTIMIZER, name, tensor.load().reshape(-1)
                continue
            for piece in Walk(parents, [tensor.spec], stem=OPTIMIZER).pieces():
                yield OPTIMIZER, name, self.mean_of(piece.inputs)


def _refuse_other_moments(parents: Sequence[Checkpoint]) -> None:
    """Moments can be averaged where all parents keep the same ones, each for one of the weights."""
    kept = []
    for parent in parents:
        if parent.optimizer is None:
            raise InputError(f"{parent.path} holds no optimizer state, so moments can not be averaged; leave moments=averaged out.")
        kept.append({name: tensor.shape for name, tensor in parent.optimizer.items()})
        if differing := sorted(set(kept[-1].items()) ^ set(kept[0].items())):
            raise MismatchError(f"{parents[0].path} and {parent.path} keep different optimizer state: '{differing[0][0]}' is not the same in both.")
    for name in kept[0]:
        if name.rpartition("/")[0] not in parents[0].tensors:
            raise MismatchError(f"{parents[0].path} keeps '{name}' for a weight that it does not hold, so moments can not be averaged.")
