"""The documents that a run did not train on, as text, and a fixed choice among the questions that can be asked of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from cairn.errors import InputError, suggestion
from cairn.evaluation.choices import Choices
from cairn.randomness import seed_for, uniform

if TYPE_CHECKING:
    from cairn.data.order.feed import Feed
    from cairn.data.text.tokenizer import Tokenizer

T = TypeVar("T")


def documents(tokenizer: Tokenizer, feed: Feed | None, only: str | None = None) -> Iterator[str]:
    """The held-out documents of all sources, or of one, in their order. Raises `InputError` where the run's data are not known or lack that source."""
    if feed is None:
        raise InputError("This is measured on the held-out documents of the run; this checkpoint has none.")
    names = [source.name for source in feed.sources]
    if only is not None and only not in names:
        raise InputError(f"The run has no source '{only}'.{suggestion(only, names)}")
    for source in feed.sources:
        if only not in (None, source.name):
            continue
        split = source.store.held_out
        ends = np.append(split.starts[1:], len(split.tokens))
        for begin, end in zip(split.starts.tolist(), ends.tolist(), strict=True):
            yield tokenizer.decode(split.tokens[int(begin) + 1 : int(end)].tolist())


def digest(feed: Feed | None) -> str:
    """Identity of those documents."""
    return ",".join(source.store.digest for source in feed.sources) if feed is not None else ""


def drawn(candidates: Sequence[T], count: int, seed: int, what: str) -> list[T]:
    """`count` of the candidates (all, if there are fewer) in a random order that depends on the seed alone."""
    if not candidates:
        raise InputError(f"The held-out documents contain no {what}; raise data.held_out.")
    order = np.argsort(uniform(seed_for(seed, what), np.arange(len(candidates))), kind="stable")
    return [candidates[i] for i in order[:count]]


class HeldOutChoices(Choices):
    """Base of choices that are made from the run's own held-out documents."""

    seed: int = 0
    """Decides which questions are asked."""

    def needs_feed(self) -> bool:
        return True

    def data_digest(self, feed: Feed | None = None) -> str:
        return digest(feed)
