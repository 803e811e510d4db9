"""Objectives: what the loss is.

An objective has a data side, `arrays`, which turns samples into the model's inputs on the loader's thread with numpy
alone, and a model side, `loss`, which returns a SUM over positions. The loop divides by the weight of the whole global
batch, so that micro-batches and ranks never change what is computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from cairn.errors import InputError
from cairn.options import Options

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cairn.models.config import Network


@dataclass
class Loss:
    """What an objective returns for one micro-batch: the scalar sum to differentiate, and sums (scalars or tensors) to report beside it."""

    total: torch.Tensor
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """Where an objective is used: the preprocessor (of text: a tokenizer), the model, the units of a sample, and whether documents that share
    a row are kept apart."""

    preprocessor: Any
    model: Network
    length: int = 1
    documents: bool = False


class Objective(Options, ABC):
    """Base of all objectives."""

    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})
    """What a sample has to consist of, in the words of the fields (`DataField.gives`)."""

    catalog_kind: ClassVar[str] = "objective"
    teachers: ClassVar[tuple[str, ...]] = ()
    """Names of the teachers that it can learn from; what they say of a batch is in it as `teacher.NAME`."""
    needs_teachers: ClassVar[bool] = False
    """Whether it can do nothing without them."""

    def logits(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What a model, the one in training or a teacher, says of a batch: logits, the alternatives in the last dimension."""
        from cairn.models import masks

        mask = masks.document(batch["documents"]) if "documents" in batch else None
        said: torch.Tensor = model(batch["input_ids"], mask=mask).logits
        return said

    def said(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What of a teacher this objective learns from, with the samples on the first axis; by default the logits."""
        return self.logits(model, batch)

    def meeting(self, model: nn.Module, teachers: Mapping[str, nn.Module]) -> Self:
        """The objective with everything filled in that depends on the teachers of a run. Raises `InputError` for one that it cannot learn from."""
        return self

    def learned(self, model: nn.Module, teachers: Mapping[str, nn.Module], seed: int) -> dict[str, torch.Tensor]:
        """First values of what the objective itself learns, by name; `loss` finds what has become of them in the batch as `learned.NAME`."""
        return {}

    def taught(self, batch: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        """What a teacher says of a batch. Raises `InputError` outside of training, where there are no teachers."""
        if f"teacher.{name}" not in batch:
            raise InputError(f"This objective learns from the teacher '{name}', which is there in training only; measure with held-out instead.")
        return batch[f"teacher.{name}"]

    def special_tokens(self) -> list[str]:
        """Special tokens that the tokenizer of a run has to have; those that it lacks are added behind its ids."""
        return []

    def fitted(self, setting: Setting) -> Self:
        """The objective with everything filled in that depends on where it is used. Raises `InputError` where it cannot be used."""
        if setting.model.encoder_decoder:
            raise InputError(f"This objective is for decoders, and '{setting.model.model_type}' reads with an encoder; use prefix-lm or a denoising objective.")
        if not getattr(setting.model, "causal", True):
            raise InputError(f"This objective predicts what follows, and a '{setting.model.model_type}' sees a text whole; use objective=mlm.")
        return self

    def sizes(self, length: int) -> tuple[int, int]:
        """Most tokens that an encoder reads and that a decoder says of a sequence of `length`."""
        return length - length // 2, length // 2

    def figures(self, parts: Mapping[str, Any]) -> dict[str, float]:
        """What is reported beside the loss, from `Loss.parts` summed over the global batch and divided by its weight; a part that is no
        scalar comes as lists."""
        return dict(parts)

    @abstractmethod
    def arrays(self, samples: Any) -> dict[str, np.ndarray]:
        """Model inputs for `samples`, each with the samples on its first axis; `weights` (n, T) float32 is required:
        the weight of each position in the loss, whose sum over the global batch is what the loss is divided by."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Loss:
        """Sum of the weighted losses of a micro-batch whose tensors come from `arrays`."""

    @property
    def separable(self) -> bool:
        """Whether `token_losses` gives what `loss` adds up."""
        return False

    def token_losses(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The loss of each position (n, T), unweighted, each of which can be differentiated."""
        raise NotImplementedError(f"{type(self).__name__} is not separable")
