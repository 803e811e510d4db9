"""The documents that a run did not train on, as text, and a fixed choice among the questions that can be asked of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from cairn.errors import InputError, suggestion
from cairn.evaluation.choices import Choices
from cairn.evaluation.measure import Measurement
from cairn.randomness import seed_for, uniform

if TYPE_CHECKING:
    from cairn.data.order.feed import Feed
    from cairn.data.text.feed import Samples
    from cairn.data.text.tokenizer import Tokenizer
    from cairn.data.text.tokens import Split

T = TypeVar("T")


class HeldOutText(Measurement):
    """Base of measurements that are made on text which the model was not trained on."""

    corpus: Any = None
    """A corpus (a name, a path, a prepared store) to take documents from, all of them, in place of the run's own held-out part."""

    def needs_feed(self) -> bool:
        return self.corpus is None

    def data_digest(self, feed: Feed | None = None) -> str:
        return corpus_digest(self.corpus) if self.corpus is not None else digest(feed)

    def documents(self, tokenizer: Tokenizer, feed: Feed | None, only: str | None = None) -> Iterator[str]:
        """The documents, in their order; of one source of the run where `only` names it."""
        return documents(tokenizer, feed, only) if self.corpus is None else documents_of(self.corpus, tokenizer)


def documents(tokenizer: Tokenizer, feed: Feed | None, only: str | None = None) -> Iterator[str]:
    """The held-out documents of all sources, or of one, in their order. Raises `InputError` where the run's data are not known or lack that source."""
    if feed is None:
        raise InputError("This is measured on the held-out documents of the run, and this checkpoint has none; name a text: corpus=NAME_OR_PATH.")
    names = [source.name for source in feed.sources]
    if only is not None and only not in names:
        raise InputError(f"The run has no source '{only}'.{suggestion(only, names)}")
    for source in feed.sources:
        if only in (None, source.name):
            yield from _texts(source.store.held_out, tokenizer)


def documents_of(corpus: Any, tokenizer: Tokenizer) -> Iterator[str]:
    """The documents of a corpus, or of a prepared store, in their order."""
    from cairn.data import corpora
    from cairn.data.text.tokens import prepare_cached, prepared_at

    if prepared_at(corpus) is None:
        yield from (document.text for document in corpora.resolve(corpus).documents())
        return
    opened = prepare_cached(corpus, tokenizer)
    for split in (opened.train, opened.held_out):
        yield from _texts(split, tokenizer)


def windows_of(corpus: Any, tokenizer: Tokenizer, count: int, length: int) -> Samples:
    """Windows of a corpus, evenly spaced over it, in which no document sees another."""
    from cairn.data.text.feed import SourceSpec, TextFeed
    from cairn.data.text.tokens import prepare_cached

    opened = prepare_cached(corpus, tokenizer, held_out=0.0)
    return TextFeed([SourceSpec("text", opened)], length, seed=0, documents="mask").evenly(count, "train")


def corpus_digest(corpus: Any) -> str:
    """Identity of a corpus, or of a prepared store."""
    from cairn.data import corpora
    from cairn.data.text.tokens import open_store, prepared_at

    store = prepared_at(corpus)
    return open_store(store).digest if store is not None else corpora.resolve(corpus).fingerprint()


def _texts(split: Split, tokenizer: Tokenizer) -> Iterator[str]:
    ends = np.append(split.starts, len(split.tokens))[1:]
    for begin, end in zip(split.starts.tolist(), ends.tolist(), strict=True):
        yield tokenizer.decode(split.tokens[int(begin) + 1 : int(end)].tolist())


def digest(feed: Feed | None) -> str:
    """Identity of the held-out documents of a run."""
    return ",".join(source.store.digest for source in feed.sources) if feed is not None else ""


def drawn(candidates: Sequence[T], count: int, seed: int, what: str) -> list[T]:
    """`count` of the candidates (all, if there are fewer) in a random order that depends on the seed alone."""
    if not candidates:
        raise InputError(f"The held-out documents contain no {what}; name a text that has some: corpus=NAME_OR_PATH.")
    order = np.argsort(uniform(seed_for(seed, what), np.arange(len(candidates))), kind="stable")
    return [candidates[i] for i in order[:count]]


class HeldOutChoices(Choices, HeldOutText):
    """Base of choices that are made from held-out documents."""

    seed: int = 0
    """Decides which questions are asked."""
