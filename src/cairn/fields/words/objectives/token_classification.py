"""Token classification: a tag for each word, and guessing words that are hidden.

    loss = -(1/n) sum over n words of log softmax(logits)[tag]

With a share of words hidden, only those count: where the tags are the words themselves, a model learns the language by guessing them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from pydantic import Field

from cairn.catalog import Paper, register
from cairn.errors import InputError
from cairn.fields.words.processor import EMPTY, HIDDEN
from cairn.fields.words.sentence_sets import UNTAGGED
from cairn.randomness import uniform
from cairn.training.objectives import Loss, Objective, Setting

if TYPE_CHECKING:
    import torch
    from torch import nn


@register("objective", "token-classification", paper=Paper("BERT: Pre-training of Deep Bidirectional Transformers", "arXiv:1810.04805"))
class TokenClassification(Objective):
    """Mean cross-entropy of the tag of each word that has one; metrics.jsonl has the share that is told right as `accuracy` beside."""

    needs: ClassVar[frozenset[str]] = frozenset({"words", "tags"})

    hidden: float = Field(0.0, ge=0, lt=1)
    """Share of the words that the model does not see, drawn for each sample anew; where it is more than 0, they alone count in the loss."""

    def fitted(self, setting: Setting) -> Self:
        classes = getattr(setting.model, "classes", None)
        if classes is None:
            raise InputError(f"A '{setting.model.model_type}' has no tags; take a family that classifies, or another objective.")
        if len(classes) < 2:
            raise InputError(f"All words have one tag ('{classes[0]}'); a tagger needs at least two.")
        return super().fitted(setting)

    def arrays(self, samples: Any) -> dict[str, np.ndarray]:
        """The inputs of the samples, their `tags` (n, T), those that are not there as 0, and `weights` (n, T)."""
        tagged = samples.tags != UNTAGGED
        pieces = samples.inputs["pieces"]
        if self.hidden:
            places = np.arange(samples.tags.shape[1])
            there = places < samples.inputs["lengths"][:, None]
            unseen = (uniform(samples.keys[:, None], places) < self.hidden) & there
            pieces = np.where(unseen[..., None], EMPTY, pieces)
            pieces[..., 0] = np.where(unseen, HIDDEN, pieces[..., 0])
            tagged &= unseen
        tags = np.where(samples.tags == UNTAGGED, 0, samples.tags)
        return {**samples.inputs, "pieces": pieces, "tags": tags, "weights": tagged.astype(np.float32)}

    def loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Loss:
        logits, tags, weights = self._answers(model, batch)
        right = (weights * (logits.detach().argmax(-1) == tags)).sum()
        return Loss((weights * _losses(logits, tags)).sum(), {"accuracy": right})

    @property
    def separable(self) -> bool:
        return True

    def token_losses(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        logits, tags, _ = self._answers(model, batch)
        if not self.hidden:
            return _losses(logits, tags)
        return _losses(logits, tags).new_zeros(batch["weights"].shape).masked_scatter(batch["weights"] > 0, _losses(logits, tags))

    def _answers(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits, tags and weights of all words; where some are hidden of these alone, which are few and may have many tags."""
        inputs = {name: tensor for name, tensor in batch.items() if name not in ("tags", "weights")}
        if not self.hidden:
            return model(**inputs), batch["tags"], batch["weights"]
        asked = batch["weights"] > 0
        return model(**inputs, asked=asked), batch["tags"][asked], batch["weights"][asked]


def _losses(logits: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each word: (..., K) and (...) to (...)."""
    from torch.nn.functional import cross_entropy

    wide = logits if logits.dtype.itemsize >= 4 else logits.float()
    return cross_entropy(wide.flatten(0, -2), tags.flatten(), reduction="none").view(tags.shape)
