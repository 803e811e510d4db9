"""Many texts in few rows: each distinct beginning is read once, and no row is padded where another text fits.

Texts are sorted; those that follow one another share their longest common beginning, and a run of them becomes a tree that is
laid out in depth-first order. A token attends to its ancestors alone (`models.masks.tree`) and stands at its depth in the tree, so a
text reads as if it were alone. Trees are then packed into rows ("Prepacking", 2404.09529, section 3; sharing beginnings is ours).
"""

from __future__ import annotations

import bisect
import functools
import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

ROW_TOKENS = 128
"""A row is at least this long where there is enough to fill it; longer where one tree is."""
WIDEST = 640
"""Trees are not put side by side into rows longer than this to save padding: attention would cost more than it saves."""
REREAD = 1200
"""Length of a row at which attention costs about as much as all the rest (measured; eight layers of width 256 on a CPU)."""
TREE_TOKENS = 2048
"""Beyond this many tokens a tree goes on only where reading its beginning again would cost more."""


@dataclass(frozen=True, eq=False)
class Tree:
    """Texts with shared beginnings in depth-first order: for each of n positions its token, its depth, and where its subtree ends.
    `texts` says which texts they are, `paths` the position of every token of each, from the one asked for on."""

    tokens: NDArray[np.int64]
    depths: NDArray[np.int64]
    ends: NDArray[np.int64]
    texts: list[int]
    paths: list[NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def wanted(self) -> int:
        """Number of positions on the paths."""
        return len(np.unique(np.concatenate(self.paths)))


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows (B, W) of trees for one forward pass; `places` has for each text its number, its row and the columns of its path."""

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    ends: NDArray[np.int64]
    places: list[tuple[int, int, NDArray[np.int64]]]


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    if len(b) >= len(a) and a == b[: len(a)]:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def distinct(texts: Sequence[Sequence[int]]) -> int:
    """Number of distinct beginnings of the texts, each counted by its last token: what cannot be avoided to be read."""
    ordered = sorted(map(list, texts))
    return sum(map(len, ordered)) - sum(shared(a, b) for a, b in pairwise(ordered))


def trees(texts: Sequence[Sequence[int]], firsts: Sequence[int] | None = None, *, share: bool = True, most: int | None = None) -> list[Tree]:
    """The texts as trees of at most `most` tokens, or one text. `firsts`: from which position on the path of each is wanted (default 0)."""
    order = sorted(range(len(texts)), key=lambda number: list(texts[number]))
    found: list[Tree] = []
    run: list[tuple[int, int]] = []
    size = 0
    for place, number in enumerate(order):
        common = shared(texts[order[place - 1]], texts[number]) if run and share else 0
        if run and (size >= enough(common) or (most is not None and size + len(texts[number]) - common > most)):
            found.append(_tree(texts, run, firsts))
            run, size, common = [], 0, 0
        run.append((number, common))
        size += len(texts[number]) - common
    return [*found, _tree(texts, run, firsts)] if run else found


def enough(common: int) -> float:
    """How many tokens a tree has gathered when it may be cut although `common` tokens are then read again.

    Nine times as many, so that rereading adds an eighth at most; where that makes rows too long, the n at which reading n + s
    positions of cost 1 + length / REREAD each is cheapest for each text: n = sqrt(s^2 + REREAD s).
    """
    return max(min(9 * common, TREE_TOKENS), math.sqrt(common * common + REREAD * common))


def _tree(texts: Sequence[Sequence[int]], run: list[tuple[int, int]], firsts: Sequence[int] | None) -> Tree:
    tokens: list[int] = []
    depths: list[int] = []
    ends: list[int] = []
    path: list[int] = []
    paths = []
    for number, common in run:
        text, place = texts[number], len(tokens)
        for column in path[common:]:
            ends[column] = place
        grown = len(text) - common
        path[common:] = range(place, place + grown)
        tokens += text[common:]
        depths += range(common, len(text))
        ends += [0] * grown
        paths.append(np.array(path[firsts[number] if firsts is not None else 0 :], np.int64))
    for column in path:
        ends[column] = len(tokens)
    return Tree(np.array(tokens, np.int64), np.array(depths, np.int64), np.array(ends, np.int64), [number for number, _ in run], paths)


def batches(forest: Sequence[Tree], budget: int, row_tokens: int = ROW_TOKENS, *, most_wanted: int = 2**62, pack: bool = True) -> Iterator[Batch]:
    """Rows of trees, longest first, as many in a batch as `budget` tokens and `most_wanted` wanted positions allow (at least one).

    A batch is as wide as its longest tree, or `row_tokens`; each row takes the largest tree that still fits until none does.
    Without `pack` there is one tree in a row.
    """
    order = sorted((i for i in range(len(forest)) if len(forest[i])), key=lambda i: (len(forest[i]), -i))
    sizes = [len(forest[i]) for i in order]
    while order:
        width, wanted = max(row_tokens, sizes[-1]) if pack else sizes[-1], 0
        rows: list[list[Tree]] = []
        while order and (not rows or ((len(rows) + 1) * width <= budget and wanted < most_wanted)):
            rows.append([])
            room = width
            while (at := bisect.bisect_right(sizes, room) - 1) >= 0 and (pack or not rows[-1]):
                room -= sizes.pop(at)
                rows[-1].append(forest[order.pop(at)])
                wanted += rows[-1][-1].wanted
        yield _batch(_tight(rows) if pack else rows)


def _tight(rows: list[list[Tree]]) -> list[list[Tree]]:
    """The same trees in rows that waste little, as short as possible: the last row of a small set need not stand half empty."""
    forest = sorted((tree for row in rows for tree in row), key=len, reverse=True)
    total = sum(map(len, forest))
    best = rows
    for count in range(len(rows), max(1, total // (2 * len(forest[0]))) - 1, -1):
        if _area(best) <= 1.06 * total:
            break
        spread = _spread(forest, count)
        if max(sum(map(len, row)) for row in spread) > max(len(forest[0]), WIDEST):
            break
        best = min(best, spread, key=_area)
    return best


def _area(rows: list[list[Tree]]) -> int:
    """Tokens of the rows, padding included."""
    return len(rows) * max(sum(map(len, row)) for row in rows)


def _spread(forest: list[Tree], count: int) -> list[list[Tree]]:
    """Trees, largest first, over `count` rows, each put into the shortest."""
    rows: list[list[Tree]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for tree in forest:
        load, number = heapq.heappop(loads)
        rows[number].append(tree)
        heapq.heappush(loads, (load + len(tree), number))
    return [row for row in rows if row]


def _batch(rows: list[list[Tree]]) -> Batch:
    width = max(sum(map(len, row)) for row in rows)
    tokens, positions = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    ends = np.tile(np.arange(1, width + 1), (len(rows), 1))
    places = []
    for number, row in enumerate(rows):
        begin = 0
        for tree in row:
            here = slice(begin, begin + len(tree))
            tokens[number, here], positions[number, here], ends[number, here] = tree.tokens, tree.depths, tree.ends + begin
            places += [(text, number, path + begin) for text, path in zip(tree.texts, tree.paths, strict=True)]
            begin += len(tree)
    return Batch(tokens, positions, ends, places)
