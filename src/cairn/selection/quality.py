"""Choosing documents by how likely an n-gram model of good text finds them ("Efficient Continual Pre-training by Mitigating the Stability Gap", strategy 2).

Over the bytes of UTF-8, with h the longest history and h' the one that is a byte shorter (interpolated, Witten and Bell):

    p(c | h) = (count(h c) + T(h) p(c | h')) / (count(h) + T(h)),    T(h) the number of different bytes seen after h;  p(c) = 1/256 at last

A document's score is its mean of -log2 p in bits a byte: low is like the reference.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cairn import cache
from cairn.data import corpora
from cairn.errors import InputError

Keys = NDArray[np.uint64]
ORDER = 5
"""Bytes of the longest n-gram; eight would still fit in a key."""


class NGram:
    """A byte n-gram model of texts."""

    def __init__(self, texts: Iterable[str], order: int = ORDER) -> None:
        """Counts the n-grams of each text up to `order` bytes; memory grows with the different ones. Raises `InputError` without any text."""
        data = np.frombuffer("\n".join(texts).encode(errors="surrogatepass"), np.uint8)
        if not len(data):
            raise InputError("The reference corpus holds no text to compare with.")
        self.order = order
        self._grams: list[tuple[Keys, NDArray[np.int64]]] = []
        self._histories: list[tuple[Keys, NDArray[np.int64], NDArray[np.int64]]] = []
        for size in range(1, order + 1):
            keys, counts = np.unique(_keys(data, size), return_counts=True)
            self._grams.append((keys, counts))
            histories, first = np.unique(keys >> np.uint64(8), return_index=True)
            self._histories.append((histories, np.add.reduceat(counts, first), np.diff(np.append(first, len(keys)))))

    def bits(self, text: str) -> float:
        """Mean of -log2 p over the bytes of a text; each sees at most `order` - 1 bytes before it. 0 for an empty text."""
        data = np.frombuffer(text.encode(errors="surrogatepass"), np.uint8)
        if not len(data):
            return 0.0
        chances = np.full(len(data), 1 / 256)
        for size in range(1, min(self.order, len(data)) + 1):
            grams = _keys(data, size)
            (keys, counts), (histories, totals, kinds) = self._grams[size - 1], self._histories[size - 1]
            seen = _looked_up(keys, counts, grams)
            total, kind = (_looked_up(histories, values, grams >> np.uint64(8)) for values in (totals, kinds))
            part = chances[size - 1 :]
            known = total > 0
            part[known] = (seen[known] + kind[known] * part[known]) / (total[known] + kind[known])
        return float(-np.log2(chances).mean())


def _keys(data: NDArray[np.uint8], size: int) -> Keys:
    """Every run of `size` bytes as one number, the last byte lowest."""
    found = np.zeros(max(0, len(data) - size + 1), np.uint64)
    for place in range(size):
        found = (found << np.uint64(8)) | data[place : place + len(found)].astype(np.uint64)
    return found


def _looked_up(keys: Keys, values: NDArray[np.int64], wanted: Keys) -> NDArray[np.int64]:
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)


def best_documents(corpus: Any, reference: Any, *, keep: float = 0.25, clip: float = 0.02) -> Path:
    """A JSON-lines file with the share `keep` of a corpus' text that is most like the reference, in the corpus' own order.

    Exact repetitions are dropped first, and the share `clip` that is likest of all is left out. The file lies in the cache under the digest
    of all that decides it. Raises `InputError` when nothing is left.
    """
    source, good = corpora.resolve(corpus), corpora.resolve(reference)
    key = corpora.digest_of("quality", source.fingerprint(), good.fingerprint(), ORDER, keep, clip)[:24]
    folder = cache.directory() / "selected" / key
    if not folder.is_dir():
        model = NGram(document.text for document in good.documents())
        texts = [document.text for document in corpora.distinct(source.documents()) if document.text]
        chosen = [texts[i] for i in likest([model.bits(text) for text in texts], [len(text.encode(errors="surrogatepass")) for text in texts], keep, clip)]
        if not chosen:
            raise InputError(f"No document is left of a corpus of {len(texts)} when {clip:.3g} of it is clipped and {keep:.3g} kept; keep more.")
        cache.publish(folder, lambda hidden: (hidden / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen)))
    return folder / "texts.jsonl"


def likest(bits: list[float], sizes: list[int], keep: float, clip: float) -> list[int]:
    """Numbers of the documents that lie between `clip` and `clip` + `keep` of all bytes when the likest come first; in their own order."""
    order = np.argsort(np.asarray(bits), kind="stable")
    before = np.cumsum(np.asarray(sizes)[order]) - np.asarray(sizes)[order]
    total = sum(sizes)
    return sorted(order[(before >= clip * total) & (before < (clip + keep) * total)].tolist())
