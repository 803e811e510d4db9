"""How varied a set of texts is, and how much of a reference it still covers.

    distinct-n     different n-grams of words / all n-grams of words
    entropy        -sum p log2 p over the words, in bits
    coverage       share of the reference's different words that appear; tail: of its rarest tenth of words, by tokens
    duplicates     share of the documents that repeat an earlier one

Words are what white space separates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cairn.errors import InputError

TAIL = 0.1


@dataclass(frozen=True)
class Diversity:
    """Figures of a set of texts; see the head of the module. Coverage is nan without a reference."""

    distinct_1: float
    distinct_2: float
    distinct_4: float
    entropy: float
    duplicates: float
    coverage: float
    tail: float


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
    return Diversity(one, two, four, entropy, 1 - len(set(kept)) / len(kept), covered, tail)


def distinct(documents: Sequence[Sequence[str]], n: int) -> float:
    """Share of the n-grams that are different ones; nan where no document has n words. Compare sets of equal size only."""
    grams = [tuple(words[i : i + n]) for words in documents for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def tail_words(counts: Counter[str], share: float = TAIL) -> Iterator[str]:
    """The rarest words that together make up `share` of all, ties by name."""
    left = share * sum(counts.values())
    for word, count in sorted(counts.items(), key=lambda item: (item[1], item[0])):
        left -= count
        if left < 0:
            return
        yield word


def _covered(counts: Counter[str], reference: Iterable[str] | None) -> tuple[float, float]:
    if reference is None:
        return math.nan, math.nan
    known = Counter(word for text in reference for word in text.split())
    rare = list(tail_words(known))
    covered = sum(word in counts for word in known) / len(known) if known else math.nan
    return covered, sum(word in counts for word in rare) / len(rare) if rare else math.nan
