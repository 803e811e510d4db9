"""What was in the training data after all: exact copies of texts in the token files of a checkpoint's own run.

Where the corpus is known, an audit's suspicion can be held against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cairn.checkpoint.format.read import Checkpoint
from cairn.errors import InputError
from cairn.evaluation.measure import recipe_behind
from cairn.statistics import rank_sum

_CHUNK = 16 * 2**20
"""Ids that are searched at a time."""


def occurrences(tokens: NDArray[Any], pattern: Sequence[int]) -> int:
    """How often a sequence of ids stands in a stream of ids, overlaps counted; 0 for an empty one."""
    if not len(pattern) or len(pattern) > len(tokens) or max(pattern) > np.iinfo(tokens.dtype).max:
        return 0
    sought, width = np.array(pattern, tokens.dtype).tobytes(), tokens.dtype.itemsize
    found = 0
    for begin in range(0, len(tokens), _CHUNK):
        # One less than the pattern beyond the chunk: a match that begins in the next chunk does not fit.
        raw, place = tokens[begin : begin + _CHUNK + len(pattern) - 1].tobytes(), -1
        while (place := raw.find(sought, place + 1)) >= 0:
            found += place % width == 0  # a match between two ids is none
    return found


def copies(checkpoint: Checkpoint, texts: Sequence[str]) -> list[int]:
    """How often each text stands in the training part of the data that the checkpoint's run reads, in all its sources.

    The first and the last token of a text may melt into their neighbours, so what is between them is sought. Whether the run has
    come to a copy yet is not asked. Raises `InputError` where the data are not known.
    """
    from cairn.training.recipe import Recipe
    from cairn.training.sources import open_recorded

    recipe = recipe_behind(checkpoint)
    if recipe is None:
        raise InputError(f"{checkpoint.path} does not say on which data it was trained, so nothing can be looked up in them.")
    parsed = Recipe.parse(recipe, "recipe in lineage")
    tokenizer, feed = open_recorded(parsed.data, parsed.seed, checkpoint.tokenizer)
    streams = [source.store.train.tokens for source in feed.sources]
    return [sum(occurrences(stream, tokenizer.encode(text)[1:-1]) for stream in streams) for text in texts]


def agreement(ranks: Sequence[float], found: Sequence[int]) -> dict[str, Any]:
    """Whether items with copies in the data rank their published order higher than those without: counts, AUC and one-sided p."""
    known = np.array(found) > 0
    values = -np.array(ranks)
    auc, p = rank_sum(values[known], values[~known]) if known.any() and not known.all() else (None, None)
    return {"with_copies": int(known.sum()), "without": int((~known).sum()), "auc": auc, "p": p}
