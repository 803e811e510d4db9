"""Masked structural growth: new parts drawn at random behind a mask that rises from 0 to 1 while the large model trains.

output = old + m * new,   m = 0 at the growth: the function stays; m = 1 at the end: a plain large model

The mask multiplies the weights that new parts hand on with (of an added layer, those that end attention and MLP), so that
a checkpoint on the way holds what the model really is and opens anywhere. The values behind the mask lie beside the
weights, and the callback `unmask`, which the grown checkpoint's recipe names, raises the mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from cairn.catalog import Paper, register
from cairn.checkpoint.format.layout import TensorSpec
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.operating.stream import INGREDIENTS
from cairn.errors import InputError
from cairn.growth.body import Body, body_of
from cairn.growth.frame import Target, drawn, outputs_zeroed, row_blocks
from cairn.growth.methods.stack import PAPER
from cairn.growth.methods.zero import WRITERS, Zero, norm_share

CALLBACK = "unmask"


@register("growth", "masked", paper=(PAPER, Paper("Masked Structural Growth for 2x Faster Language Model Pre-training", "arXiv:2305.02869")))
class MaskedGrowth(Zero):
    """Deeper or wider by parts drawn at random behind a mask that training raises from 0 to 1 (section 3, G_random)."""

    sample_options: ClassVar[dict[str, Any]] = {"factor": 2, "width": 2, "mask": 1.0}

    mask: float = Field(0.0, ge=0, le=1)
    """Where the mask begins; at 1 it is gone: a plain large model with random new parts."""

    def mask_of_new(self) -> float:
        return self.mask

    def check(self, parents: Sequence[Checkpoint]) -> None:
        super().check(parents)
        if self.mask < 1 and (parents[0].trainer is None or super().recipe(parents) is None):
            raise InputError(f"{parents[0].path} was not trained here, so no run can raise the mask; give mask=1, or grow it by stack or zero.")

    def recipe(self, parents: Sequence[Checkpoint]) -> dict[str, Any] | None:
        recipe = super().recipe(parents)
        if recipe is None or self.mask == 1:
            return recipe
        kept = [callback for callback in recipe["callbacks"] if callback["name"] != CALLBACK]
        return recipe | {"callbacks": [*kept, {"name": CALLBACK}]}

    def attachments(self, parents: Sequence[Checkpoint]) -> dict[str, list[TensorSpec]]:
        ramps = self.ramps(parents[0])
        specs = [TensorSpec(f"{CALLBACK}/{spec.name}", "F32", spec.shape) for spec in self.outputs(parents) if spec.name in ramps]
        return {INGREDIENTS: specs} if specs else {}

    def callbacks(self, parent: Checkpoint) -> dict[str, Any]:
        ramps = self.ramps(parent)
        return {CALLBACK: {"mask": self.mask, "from": self.mask, "began": parent.tokens, "ramps": ramps}} if ramps else {}

    def ramps(self, parent: Checkpoint) -> dict[str, dict[str, Any]]:
        """How each tensor depends on the mask: `box`, the corner of it that does not, or `norm`, by how much the stream was widened."""
        if self.mask == 1:
            return {}
        body, found = body_of(parent), dict[str, dict[str, Any]]()
        for spec in self.outputs([parent]):
            target = self.target(spec, parent)
            if target.added and outputs_zeroed(target, body):
                found[spec.name] = {"box": [0] * len(spec.shape)}
            elif self.width > 1 and target.place.part in WRITERS:
                found[spec.name] = {"box": list(parent.tensors[target.source].shape)}
            elif self.width > 1 and target.place.part in ("norm", "final_norm"):
                found[spec.name] = {"norm": self.width}
        return found

    def parts(self, spec: TensorSpec, parents: Sequence[Checkpoint], known: Any) -> Iterator[tuple[str, str, torch.Tensor]]:
        yield from super().parts(spec, parents, known)
        if spec.name in self.ramps(parents[0]):
            for piece in self.masked(self.target(spec, parents[0]), parents[0], 1.0):
                yield INGREDIENTS, f"{CALLBACK}/{spec.name}", piece

    def masked(self, target: Target, parent: Checkpoint, mask: float) -> Iterator[torch.Tensor]:
        if target.added and not outputs_zeroed(target, body_of(parent)):
            yield from self._fresh(target, body_of(parent), norm_share(self.width, mask))
        else:
            yield from super().masked(target, parent, mask)

    def closing(self, target: Target, body: Body, mask: float) -> Iterator[torch.Tensor]:
        for piece in self._fresh(target, body, norm_share(self.width, mask)):
            yield piece * mask

    def _fresh(self, target: Target, body: Body, share: float) -> Iterator[torch.Tensor]:
        """A tensor of an added layer as a new model begins with it, norms of the residual stream times `share`."""
        part, shape = target.place.part, target.spec.shape
        if len(shape) == 1:
            yield torch.full(shape, 0.0 if part.endswith("bias") else share if part == "norm" else 1.0)
            return
        spread = float(body.config.get("initializer_range") or 0.02)
        for begin, end in row_blocks(*shape):
            yield drawn((end - begin, shape[1]), spread, self.seed, target.spec.name, "layer", begin).reshape(-1)
