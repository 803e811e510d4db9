"""Loss of any objective on text that was kept out of training: how well a model fills in spans, goes on after a prefix, or does what it was trained for.

loss = sum of weight * nll / sum of weights  [nats per target],   bits per byte = the same sum / (ln 2 * bytes of the targets)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from cairn.catalog import Paper, register
from cairn.errors import InputError
from cairn.evaluation.engine import engine_of
from cairn.evaluation.held_out_text import HeldOutText, windows_of
from cairn.evaluation.measure import Score
from cairn.options import Method
from cairn.statistics import ratio
from cairn.training.objectives import Setting

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.order.feed import Feed
    from cairn.data.text.tokenizer import Tokenizer


GROUP = 8
"""Windows of one forward pass, which are also the independent units from which the errors come."""


@register("measurement", "held-out-objective", paper=Paper("UL2: Unifying Language Learning Paradigms", "arXiv:2205.05131", card=5))
class HeldOutObjective(HeldOutText):
    """Loss per target and bits per byte of targets under an objective, on fixed held-out windows of the run's own data."""

    objective: Annotated[Any, Method("objective")] = "causal-lm"
    """Whose targets are asked for, for example `{name: span-corruption, span: 8, mode: "[NLU]"}`. Special tokens that the tokenizer
    lacks get the ids that a fork would give them."""
    sequences: int = Field(256, ge=1)
    """Windows that are scored, always the same ones, always cut and hidden in the same way."""
    task: str | None = None
    """Name in the table; default: `held-out-objective`."""

    sequence_length: int = Field(256, ge=2)
    """Window for `corpus`; the run's own data keep their own."""

    def protocol(self, feed: Feed | None = None) -> dict[str, Any]:
        described = super().protocol(feed)
        return described | ({"sequence_length": feed.sample_units} if feed is not None and self.corpus is None else {})

    def of(self, model: nn.Module, tokenizer: Tokenizer, feed: Feed | None = None) -> list[Score]:
        tokenizer = tokenizer.extended(self.objective.special_tokens())
        architecture: Any = model.architecture
        if tokenizer.vocab_size > architecture.vocab_size:
            raise InputError(
                f"The objective's special tokens need {tokenizer.vocab_size} ids and the model has {architecture.vocab_size}; "
                "measure a model that was trained with such an objective, or that has room for it."
            )
        samples, length = self._samples(tokenizer, feed)
        objective = self.objective.fitted(Setting(tokenizer, architecture, length, samples.documents is not None))
        device, arrays = next(model.parameters()).device, objective.arrays(samples)
        groups = [slice(first, first + GROUP) for first in range(0, len(samples.tokens), GROUP)]
        rows = max(1, engine_of(model).budget // arrays["targets"].shape[1])
        losses = np.array([_loss(objective, model, arrays, group, device, rows) for group in groups])
        weights = np.array([arrays["weights"][group].sum(dtype=np.float64) for group in groups])
        text = np.array([(tokenizer.token_bytes[arrays["targets"][group]] * arrays["weights"][group]).sum() for group in groups])
        loss, loss_error = ratio(losses, weights)
        bits, bits_error = ratio(losses / math.log(2), text)
        name = self.task or "held-out-objective"
        n = len(samples.tokens)
        return [Score(name, "loss", loss, loss_error, n), Score(name, "bits_per_byte", bits, bits_error, n)]

    def _samples(self, tokenizer: Tokenizer, feed: Feed | None) -> tuple[Any, int]:
        """The windows, and how long they are."""
        if self.corpus is not None:
            return windows_of(self.corpus, tokenizer, self.sequences, self.sequence_length), self.sequence_length
        if feed is None:
            raise InputError("held-out-objective needs the data of the run, or corpus=NAME_OR_PATH.")
        return feed.held_out(self.sequences), feed.sample_units


def _loss(objective: Any, model: nn.Module, arrays: dict[str, np.ndarray], group: slice, device: Any, rows: int) -> float:
    """The summed loss of some windows, at most `rows` of them at once."""
    import torch

    def part(begin: int) -> float:
        chosen = slice(begin, min(begin + rows, group.stop))
        batch = {name: torch.from_numpy(np.ascontiguousarray(array[chosen])).to(device) for name, array in arrays.items()}
        return float(objective.loss(model, batch).total)

    with torch.no_grad():
        return sum(part(begin) for begin in range(group.start, min(group.stop, len(arrays["targets"])), rows))
