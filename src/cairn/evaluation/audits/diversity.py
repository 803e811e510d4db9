"""How varied a set of texts is, and how much of a reference it still covers.

    distinct-n     different n-grams of words / all n-grams of words
    entropy        -sum p log2 p over the words, in bits
    coverage       share of the reference's different words that appear; tail: of its rarest tenth of words, by tokens
    duplicates     share of the documents that repeat an earlier one
    self-BLEU      mean over documents of BLEU-4 against all others: high where they say the same

Words are what white space separates. Self-BLEU is that of "Texygen: A Benchmarking Platform for Text Generation Models" (arXiv:1802.01886), with the BLEU
of nltk smoothed by its first method: a precision of 0 counts 0.1 of an n-gram.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cairn.errors import InputError

TAIL = 0.1
LEAST = 1e-6
"""Probability below which a model is taken to have forgotten a token."""
SAMPLE = 500
"""Documents of which self-BLEU is taken, evenly spaced: it grows with their number, so sets are compared by equally many."""
ORDERS = 4
"""Longest n-grams of BLEU."""
EPSILON = 0.1
"""What an n-gram precision without a match counts."""


@dataclass(frozen=True)
class Diversity:
    """Figures of a set of texts; see the head of the module. Coverage is nan without a reference, self-BLEU with fewer than two documents."""

    distinct_1: float
    distinct_2: float
    distinct_4: float
    entropy: float
    duplicates: float
    coverage: float
    tail: float
    self_bleu: float


def diversity(texts: Iterable[str], reference: Iterable[str] | None = None) -> Diversity:
    """Measure texts, against a reference where one is given. Raises `InputError` without a single word."""
    kept = list(texts)
    words = [text.split() for text in kept]
    counts = Counter(word for each in words for word in each)
    total = sum(counts.values())
    if not total:
        raise InputError("There is no word in these texts; their diversity is not defined.")
    entropy = -sum(n / total * math.log2(n / total) for n in counts.values())
    covered, tail = _covered(counts, reference)
    one, two, four = (distinct(words, n) for n in (1, 2, 4))
    return Diversity(one, two, four, entropy, 1 - len(set(kept)) / len(kept), covered, tail, self_bleu(spaced(words, SAMPLE)))


def distinct(documents: Sequence[Sequence[str]], n: int) -> float:
    """Share of the n-grams that are different ones; nan where no document has n words. Compare sets of equal size only."""
    grams = [tuple(words[i : i + n]) for words in documents for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def spaced(documents: Sequence[Sequence[str]], count: int) -> list[Sequence[str]]:
    """At most `count` of the documents that have words, evenly spaced in their order."""
    spoken = [words for words in documents if words]
    return [spoken[i * len(spoken) // count] for i in range(count)] if len(spoken) > count else spoken


def self_bleu(documents: Sequence[Sequence[str]]) -> float:
    """Mean BLEU-4 of each document (its words, at least one) against all others; nan with fewer than two. Exact, in time linear in the n-grams."""
    if len(documents) < 2:
        return math.nan
    shared, written = zip(*(_common(documents, n) for n in range(1, ORDERS + 1)), strict=True)
    precisions = [np.where(common > 0, common, EPSILON) / np.maximum(count, 1) for common, count in zip(shared, written, strict=True)]
    bleu = _brevity([len(words) for words in documents]) * np.exp(np.mean(np.log(precisions), axis=0))
    # Without one common word there is nothing to smooth: BLEU is 0.
    return float(np.mean(np.where(shared[0] > 0, bleu, 0.0)))


def _common(documents: Sequence[Sequence[str]], n: int) -> tuple[np.ndarray, np.ndarray]:
    """For each document, how many of its n-grams occur in another one (each at most as often as in the one that has it most often), and how many it has."""
    counts = [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for words in documents]
    most: dict[tuple[str, ...], tuple[int, int, int]] = {}  # the highest count, the document that has it, the highest elsewhere
    for number, each in enumerate(counts):
        for gram, count in each.items():
            first, holder, second = most.get(gram, (0, -1, 0))
            most[gram] = (count, number, first) if count > first else (first, holder, max(second, count))
    found = [sum(min(count, most[gram][2] if most[gram][1] == number else most[gram][0]) for gram, count in each.items()) for number, each in enumerate(counts)]
    return np.array(found), np.array([each.total() for each in counts])


def _brevity(lengths: Sequence[int]) -> np.ndarray:
    """The penalty of each document that is shorter than the nearest length among the others, the shorter one of two equally near."""
    held = Counter(lengths)
    penalties = {}
    for length, count in held.items():
        nearest = length if count > 1 else min((other for other in held if other != length), key=lambda other: (abs(other - length), other))
        penalties[length] = math.exp(min(0.0, 1 - nearest / length))
    return np.array([penalties[length] for length in lengths])


def tail_words(counts: Counter[str], share: float = TAIL) -> Iterator[str]:
    """The rarest words that together make up `share` of all, ties by name."""
    left = share * sum(counts.values())
    for word, count in sorted(counts.items(), key=lambda item: (item[1], item[0])):
        left -= count
        if left < 0:
            return
        yield word


def tail_mass(tokens: ArrayLike, logs: ArrayLike, share: float = TAIL, least: float = LEAST) -> float:
    """What a model has forgotten of real text: share of the tokens of the rarest tenth of the types (ties by id) to which it gives a probability below `least`.

    tokens (N,): the text's ids; logs (N,): log-probability of each, in nats. nan without a token.
    """
    ids, what, counts = np.unique(np.asarray(tokens), return_inverse=True, return_counts=True)
    rare = np.argsort(counts, kind="stable")[: math.ceil(share * len(ids))]
    below = np.asarray(logs)[np.isin(what, rare)] < math.log(least)
    return float(below.mean()) if len(below) else math.nan


def _covered(counts: Counter[str], reference: Iterable[str] | None) -> tuple[float, float]:
    if reference is None:
        return math.nan, math.nan
    known = Counter(word for text in reference for word in text.split())
    rare = list(tail_words(known))
    covered = sum(word in counts for word in known) / len(known) if known else math.nan
    return covered, sum(word in counts for word in rare) / len(rare) if rare else math.nan
