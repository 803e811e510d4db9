"""An update that keeps what was right: distillation from the old model where the student errs, from the new one elsewhere.

L = (1/n) sum_i [ m_i KL(old_i || student_i) + (1 - m_i) KL(new_i || student_i) + c * cross-entropy_i ],
m_i = 1 where the student's most probable token is not the right one, over the tokens of answers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from cairn.catalog import Paper, register
from cairn.training.distillation import divergence
from cairn.training.objectives import Loss, Objective

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.text.feed import Samples

Switch = Literal["student_wrong", "old_right", "likelihood", "likelihood_sequence", "old", "new"]


def from_old(student: Tensor, old: Tensor, targets: Tensor, weights: Tensor, switch: Switch = "student_wrong") -> Tensor:
    """Where the old model teaches, boolean (B, T), from logits (B, T, V); it carries no gradient (section 4 and its ablations)."""
    student, old = student.detach(), old.detach()
    if switch in ("old", "new"):
        return torch.full_like(targets, switch == "old", dtype=torch.bool)
    if switch == "student_wrong":
        return student.argmax(-1) != targets
    if switch == "old_right":
        return old.argmax(-1) == targets
    ours, theirs = (-F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none") * (weights > 0) for logits in (student, old))
    if switch == "likelihood_sequence":
        ours, theirs = ours.sum(1, keepdim=True), theirs.sum(1, keepdim=True)
    return (ours < theirs).expand_as(targets)


def compatible_losses(student: Tensor, old: Tensor, new: Tensor, targets: Tensor, mask: Tensor, temperature: float = 1.0, cross_entropy: float = 0.0) -> Tensor:
    """Loss of each position (B, T) from logits (B, T, V), targets (B, T) and where the old model teaches (B, T)."""
    losses = torch.where(mask, divergence(old, student, temperature), divergence(new, student, temperature))
    if cross_entropy:
        losses = losses + cross_entropy * F.cross_entropy(student.float().transpose(1, 2), targets, reduction="none")
    return losses


def answer_weights(tokens: np.ndarray, weights: np.ndarray, marker: list[int], end: list[int]) -> np.ndarray:
    """1 for each target (n, T) of tokens (n, T + 1) behind a marker up to and including the next end, times `weights`.

    A window that begins inside an answer has no marker before it: its first tokens count as prompt.
    """
    opens, closes = _ends_of(tokens, marker), _ends_of(tokens, end)
    places = np.arange(tokens.shape[1])
    last_open = np.maximum.accumulate(np.where(opens, places, -1), axis=1)
    last_close = np.maximum.accumulate(np.where(closes & ~opens, places, -1), axis=1)
    # A target belongs to an answer if, just before it, the last thing that happened was a marker.
    return weights * ((last_open >= 0) & (last_open > last_close))[:, :-1]


@register("objective", "compatible", paper=Paper("MUSCLE: A Model Update Strategy for Compatible LLM Evolution", "arXiv:2407.09435", card=59))
class Compatible(Objective):
    """Fine-tune the new model's checkpoint so that it keeps what the old one had right: fork it from the new one, with both as teachers.

    Without teachers: plain cross-entropy on the answers, as the task models themselves are trained.
    """

    teachers: ClassVar[tuple[str, ...]] = ("old", "new")

    mask: Switch = "student_wrong"
    """Where the old model teaches: where the student is wrong; where the old one is right; where a token (or its sequence) is likelier
    under the old one (both need `cross_entropy`); everywhere (`old`) or nowhere (`new`)."""
    temperature: float = Field(1.0, gt=0)
    cross_entropy: float = Field(0.0, ge=0)
    """Weight of the cross-entropy with the right tokens; helps where the old model is much worse than the new one."""
    marker: list[int] = []
    """Ids that end a prompt; what follows is the answer. Empty: every token counts."""
    end: list[int] = []
    """Ids that end an answer."""

    @model_validator(mode="after")
    def _teaches_something(self) -> Self:
        if bool(self.marker) != bool(self.end):
            raise ValueError("marker and end belong together: the ids before an answer, and those that end it.")
        return self

    def arrays(self, samples: Samples) -> dict[str, np.ndarray]:
        weights = samples.weights
        if self.marker:
            weights = answer_weights(samples.tokens, weights, self.marker, self.end).astype(np.float32)
        inputs: dict[str, np.ndarray] = {"input_ids": samples.tokens[:, :-1], "targets": samples.tokens[:, 1:], "weights": weights}
        return inputs | ({"documents": samples.documents[:, :-1]} if samples.documents is not None else {})

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        from cairn.models import masks

        targets, weights = batch["targets"], batch["weights"]
        if "teacher.old" not in batch:
            mask = masks.document(batch["documents"]) if "documents" in batch else None
            return Loss(model(batch["input_ids"], mask=mask, targets=targets, weights=weights).loss)
        student, old, new = self.logits(model, batch), self.taught(batch, "old"), self.taught(batch, "new")
        switched = from_old(student, old, targets, weights, self.mask)
        losses = compatible_losses(student, old, new, targets, switched, self.temperature, self.cross_entropy)
        return Loss((losses * weights).sum(), {"from_old": (switched * weights).sum()})


def _ends_of(tokens: np.ndarray, pattern: list[int]) -> np.ndarray:
    """Where in each row (n, T) an occurrence of the pattern ends, boolean (n, T)."""
    found = np.ones(tokens.shape, bool)
    for back, value in enumerate(reversed(pattern)):
        shifted = np.zeros(tokens.shape, bool)
        shifted[:, back:] = tokens[:, : tokens.shape[1] - back] == value
        found &= shifted
    return found
