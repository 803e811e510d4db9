"""What all denoising objectives share: special tokens, the two ways to lay out what is read and said, and the loss.

A decoder reads inputs and targets in one row, and sees the inputs in both directions where its architecture says `attention: prefix`;
an encoder-decoder reads the inputs and says the targets. `data.sequence_length` is the room for both together, ends and mode included,
so that every denoiser costs the same. The loss is on targets alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from pydantic import Field

from cairn.data.text import denoising
from cairn.data.text.denoising import Denoiser, Example
from cairn.errors import InputError
from cairn.options import Options
from cairn.training.objectives import Loss, Objective, Setting

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cairn.data.text.feed import Samples
    from cairn.models.masks import Mask


class Fit(Options):
    """What an objective takes from the tokenizer and the model when a run begins."""

    end: int
    """Id that begins and ends what is read and said."""
    special: dict[str, int] = {}
    """Ids of the modes and of the mask, by token."""
    sentinel: int = 0
    """Id of the first sentinel; the others lie below it."""
    words: tuple[int, int] = (0, 0)
    """First id of the text's own, and the one behind the last."""
    attention: str = "causal"
    """`causal`, `prefix`, or `cross` for an encoder-decoder."""


class Denoising(Objective):
    """Base of the objectives that read a part of a text and say another."""

    z_loss: float = Field(0.0, ge=0)
    """Coefficient of log(Z)^2, as in `causal-lm`."""
    fit: Fit | None = None
    """Filled in when the run begins."""

    sees_all: ClassVar[bool] = False
    """Whether what is asked for stands where it is read, so that an encoder alone can say it."""
    shared_rows: ClassVar[bool] = False
    """Whether documents in one row can be kept apart."""

    def special_tokens(self) -> list[str]:
        return []

    def fitted(self, setting: Setting) -> Self:
        """Raises `InputError` where the tokenizer has no end of text, or documents that share a row are to be kept apart and cannot be."""
        tokenizer = setting.preprocessor
        if not getattr(setting.model, "causal", True) and not self.sees_all:
            raise InputError(f"Objective '{self.title}' predicts what follows, and a '{setting.model.model_type}' sees a text whole; use objective=mlm.")
        if tokenizer.eos_id is None:
            raise InputError("This tokenizer has no end-of-text token, with which what is read and what is said end.")
        if setting.documents and not self.shared_rows:
            raise InputError(f"Objective '{self.title}' reads documents one after the other; set data.documents=attend and data.packing=joined.")
        words = np.flatnonzero(tokenizer.token_bytes)
        ids = {token: tokenizer.backend.token_to_id(token) for token in self.special_tokens()}
        lacking = next((token for token, number in ids.items() if number is None), None)
        if lacking is not None:
            raise InputError(f"The tokenizer has no '{lacking}', which objective '{self.title}' needs; extend it with the objective's special tokens.")
        first = ids.get(sentinel(0))
        for number in range(sum(token.startswith(_SENTINEL) for token in ids)):
            if first is None or ids[sentinel(number)] != first - number:
                raise InputError(f"The tokenizer's id of {sentinel(number)} is not {number} below that of {sentinel(0)}; sentinels must lie side by side.")
        return self.model_copy(
            update={
                "fit": Fit(
                    end=tokenizer.eos_id,
                    special={token: number for token, number in ids.items() if not token.startswith(_SENTINEL)},
                    sentinel=first or 0,
                    words=(int(words[0]), int(words[-1]) + 1),
                    attention="cross" if setting.model.encoder_decoder else "prefix" if getattr(setting.model, "reads_both_ways", False) else "causal",
                )
            }
        )

    @property
    def title(self) -> str:
        from cairn import catalog

        return catalog.name_of(self) or type(self).__name__

    @property
    def ready(self) -> Fit:
        if self.fit is None:
            raise InputError(f"Objective '{self.title}' does not know its tokenizer yet: call fitted() first, as a run does.")
        return self.fit

    def laid_out(self, examples: Sequence[Example], room: int, sizes: tuple[int, int]) -> dict[str, np.ndarray]:
        """The arrays of examples that take `room` tokens each, at most `sizes` of inputs and of targets."""
        fit = self.ready
        if fit.attention == "cross":
            return denoising.two_rows(examples, sizes, fit.end, fit.end)
        arrays = denoising.one_window(examples, room, fit.end)
        if fit.attention == "causal":
            del arrays["prefix"]
        return arrays

    def loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Loss:
        total, each = self.losses(model, batch)
        return Loss(total, {"cross_entropy": (each * batch["weights"]).sum()} if self.z_loss else {})

    def losses(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss and the negative log-likelihood of every target (n, T), under the masks that the arrays ask for."""
        output = self._output(model, batch, weights=batch["weights"], z_loss=self.z_loss)
        return output.loss, output.token_loss

    @property
    def separable(self) -> bool:
        return self.z_loss == 0

    def token_losses(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        losses: torch.Tensor = self._output(model, batch, each=True).token_loss
        return losses

    @staticmethod
    def _output(model: nn.Module, batch: Mapping[str, torch.Tensor], **options: Any) -> Any:
        if "decoder_input_ids" in batch:
            options |= {"decoder_input_ids": batch["decoder_input_ids"], **_cross_masks(batch)}
        else:
            options |= {"mask": _mask(batch)}
        return model(batch["input_ids"], targets=batch["targets"], **options)


_SENTINEL = "<extra_id_"


def sentinel(number: int) -> str:
    """The name of a sentinel, as T5's tokenizers have it."""
    return f"{_SENTINEL}{number}>"


def sentinels(count: int) -> list[str]:
    """Names of `count` sentinels in the order in which a tokenizer takes them up: the first one gets the highest id."""
    return [sentinel(number) for number in reversed(range(count))]


class SpanDenoising(Denoising):
    """Base of the objectives that hide spans by one or several denoisers."""

    sentinels: int = Field(100, ge=1)
    """Special tokens that stand for spans; a text has no more spans than that."""

    @abstractmethod
    def table(self) -> Sequence[Denoiser]:
        """The denoisers of which each sequence gets one."""

    def special_tokens(self) -> list[str]:
        return [*sentinels(self.sentinels), *dict.fromkeys(d.mode for d in self.table() if d.mode is not None)]

    def fitted(self, setting: Setting) -> Self:
        """Also refuses a sequence length for which there are too few sentinels."""
        for denoiser in self.table():
            if (needed := denoiser.spans(setting.length)) > self.sentinels:
                raise InputError(
                    f"A sequence of {setting.length} tokens has {needed} hidden spans of {denoiser.span:g} tokens and there are {self.sentinels} sentinels; "
                    "set objective.sentinels or shorten data.sequence_length."
                )
        return super().fitted(setting)

    def sizes(self, length: int) -> tuple[int, int]:
        """Most tokens of inputs and of targets, over all denoisers."""
        each = [denoiser.sizes(length) for denoiser in self.table()]
        return max(inputs for inputs, _ in each), max(targets for _, targets in each)

    def arrays(self, samples: Samples) -> dict[str, np.ndarray]:
        fit, table, room = self.ready, self.table(), samples.tokens.shape[1] - 1
        numbers = [denoising.chosen(table, int(key)) for key in keys_of(samples)]
        examples = [
            table[number].example(tokens, int(key), fit.sentinel, fit.special, room)
            for number, tokens, key in zip(numbers, samples.tokens, keys_of(samples), strict=True)
        ]
        arrays = self.laid_out(examples, room, self.sizes(room))
        return arrays | ({"denoiser": np.array(numbers, np.int64)} if len(table) > 1 else {})


def keys_of(samples: Samples) -> np.ndarray:
    """A random number for each sample, out of which its choices are drawn."""
    if samples.keys is None:
        raise InputError("These samples have no keys to draw from; take them from a feed.")
    return samples.keys


def _mask(batch: Mapping[str, torch.Tensor]) -> Mask | None:
    from cairn.models import masks

    if "documents" in batch:
        return masks.packed_prefix(batch["documents"], batch["prefix"]) if "prefix" in batch else masks.document(batch["documents"])
    return masks.prefix(batch["prefix"]) if "prefix" in batch else None


def _cross_masks(batch: Mapping[str, torch.Tensor]) -> dict[str, Mask]:
    import torch

    from cairn.models import masks

    if "input_documents" in batch:
        read, said = batch["input_documents"], batch["documents"]
        return {"encoder_mask": masks.document(read, within=masks.full()), "mask": masks.document(said), "cross": masks.cross(read >= 0, said, read)}
    ids = batch["input_ids"]
    valid = torch.arange(ids.shape[1], device=ids.device) < batch["lengths"][:, None]
    return {"encoder_mask": masks.padded(valid, within=masks.full()), "cross": masks.cross(valid)}
