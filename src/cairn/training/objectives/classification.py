"""Classification: one label for each sample.

loss = -log softmax(logits)[label],   with label smoothing e: -(1 - e) log p[label] - e / K sum_k log p[k]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from pydantic import Field

from cairn.catalog import Paper, register
from cairn.errors import InputError
from cairn.training.objectives import Loss, Objective, Setting

if TYPE_CHECKING:
    import torch
    from torch import nn


@register("objective", "classification", paper=Paper("Rethinking the Inception Architecture for Computer Vision", "arXiv:1512.00567"))
class Classification(Objective):
    """Mean cross-entropy of the label of each sample; metrics.jsonl has the share that is told right as `accuracy` beside."""

    needs: ClassVar[frozenset[str]] = frozenset({"labels"})

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the probability that is spread evenly over all classes (section 7 of the paper)."""

    def fitted(self, setting: Setting) -> Self:
        classes = getattr(setting.model, "classes", None)
        if classes is None:
            raise InputError(f"A '{setting.model.model_type}' has no classes; take a family that classifies, or another objective.")
        if len(classes) < 2:
            raise InputError(f"All samples are of one class ('{classes[0]}'); a classifier needs at least two.")
        return super().fitted(setting)

    def arrays(self, samples: Any) -> dict[str, np.ndarray]:
        """The inputs of the samples, their `labels` (n,) and `weights` (n, 1)."""
        return {**samples.inputs, "labels": samples.labels, "weights": np.ones((len(samples.labels), 1), np.float32)}

    def loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Loss:
        logits = _logits(model, batch)
        weights = batch["weights"][:, 0]
        right = (weights * (logits.detach().argmax(1) == batch["labels"])).sum()
        return Loss((weights * self._losses(logits, batch["labels"])).sum(), {"accuracy": right})

    @property
    def separable(self) -> bool:
        return True

    def token_losses(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The loss of each sample (n, 1)."""
        return self._losses(_logits(model, batch), batch["labels"])[:, None]

    def _losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        from torch.nn.functional import cross_entropy

        wide = logits if logits.dtype.itemsize >= 4 else logits.float()
        return cross_entropy(wide, labels, reduction="none", label_smoothing=self.label_smoothing)


def _logits(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What a model says of its inputs, which are whatever is neither a label nor a weight: (n, K)."""
    found: torch.Tensor = model(**{name: tensor for name, tensor in batch.items() if name not in ("labels", "weights")})
    return found
