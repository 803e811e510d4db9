"""Updates compared item by item: what the old checkpoint got right and the new one gets wrong.

accuracy(new) - accuracy(old) = positive flips - negative flips: a better mean hides the second term ("MUSCLE", section 3).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cairn import catalog
from cairn.checkpoint.format import read
from cairn.checkpoint.format.read import Checkpoint
from cairn.errors import InputError, MismatchError
from cairn.evaluation.compute import Compute
from cairn.evaluation.items import ItemMeasurement, Seen, observe, right_of
from cairn.evaluation.measure import Measurement
from cairn.options import configure
from cairn.statistics import mcnemar, paired_proportions, wilson


@dataclass(frozen=True)
class Flips:
    """What an update changes on N items; shares of N unless said otherwise, with 95 % intervals."""

    n: int
    old: float
    """Accuracy of the old checkpoint."""
    new: float
    change: tuple[float, float]
    """95 % interval of new - old, paired by item."""
    negative: float
    """Right before, wrong now."""
    negative_interval: tuple[float, float]
    positive: float
    """Wrong before, right now."""
    changed_wrong: float | None
    """Wrong now and answered otherwise than before; None where answers were not recorded, only whether they are right."""
    trust: float | None
    """Share of the items that were right before that still are; None where none was."""
    p: float
    """Exact p-value that items flip one way as often as the other (McNemar)."""
    gain: float | None = None
    """Mean rise in similarity of the answers that got closer to the right one; None without answers in words, or where none did."""
    regression: float | None = None
    """Mean fall of those that got further from it."""
    floor: float | None = None
    """Negative flips to a checkpoint that differs by its seed alone: what no update can be blamed for."""
    above_floor: tuple[float, float] | None = None
    """95 % interval of negative - floor, paired by item."""
    flipped: tuple[int, ...] = ()
    """Numbers of the items that flipped from right to wrong."""


def compare(old: Seen, new: Seen, twin: Seen | None = None) -> Flips:
    """Flips between what two checkpoints said of the same items; `twin` is what another seed of the old one said."""
    before, after = _right(old), _right(new)
    if len(before) != len(after) or (twin is not None and len(_right(twin)) != len(before)):
        raise MismatchError(f"The checkpoints were asked {len(before)} and {len(after)} items; flips are counted on the same ones.")
    n, lost, won = len(before), before & ~after, ~before & after
    changed = None
    if "said" in old and "said" in new:
        changed = float(np.mean([not right and a != b for right, a, b in zip(after, new["said"], old["said"], strict=True)]))
    floor, above = None, None
    if twin is not None:
        noise = before & ~_right(twin)
        floor, above = float(noise.mean()), paired_proportions(noise, lost)
    gain, regression = _shifts(old, new)
    return Flips(
        n=n,
        old=float(before.mean()),
        new=float(after.mean()),
        change=paired_proportions(before, after),
        negative=float(lost.mean()),
        negative_interval=wilson(int(lost.sum()), n),
        positive=float(won.mean()),
        changed_wrong=changed,
        trust=float((before & after).sum() / before.sum()) if before.any() else None,
        p=mcnemar(int(lost.sum()), int(won.sum())),
        gain=gain,
        regression=regression,
        floor=floor,
        above_floor=above,
        flipped=tuple(np.flatnonzero(lost).tolist()),
    )


def flips(
    old: str | Path | Checkpoint,
    new: str | Path | Checkpoint,
    task: Any,
    *,
    twin: str | Path | Checkpoint | None = None,
    store: bool = True,
    device: Any = None,
    dtype: str = "float32",
    progress: Callable[[str], object] | None = None,
) -> Flips:
    """Compare two checkpoints on a task whose items are right or wrong (`exact-answer`, `choice`, `light-instruction`).

    `task` is a mapping with `name` and options. `twin` is a checkpoint like the old one but for its seed, which gives the
    floor below which flips are noise. Raises `MismatchError` when the tokenizers differ.
    """
    measurement = configure(Measurement, task)
    if not isinstance(measurement, ItemMeasurement):
        raise InputError(
            f"'{catalog.name_of(measurement)}' does not keep its single items, so flips cannot be counted; use exact-answer, choice or light-instruction."
        )
    compute = Compute(device, dtype)
    opened = [each if isinstance(each, Checkpoint) else read.open(each) for each in (old, new, *([twin] if twin is not None else []))]
    digests = {each.tokenizer.digest if each.tokenizer is not None else None for each in opened}
    if len(digests) > 1:
        raise MismatchError(f"{opened[0].path} and {opened[1].path} have different tokenizers; an update is judged on the same ids.")
    before, after, *others = (observe(each, measurement, store=store, compute=compute, progress=progress) for each in opened)
    return compare(before, after, others[0] if others else None)


def rouge(text: str, reference: str) -> float:
    """Unigram F of two texts, repeated words counted as often as they stand in both (ROUGE-1)."""
    ours, theirs = Counter(text.lower().split()), Counter(reference.lower().split())
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total()) if shared else 0.0


def _right(seen: Seen) -> NDArray[np.bool_]:
    if "right" not in seen:
        raise InputError("This measurement does not say of single items whether they are right; use exact-answer, choice or light-instruction.")
    return right_of(seen)


def _shifts(old: Seen, new: Seen, band: float = 0.0) -> tuple[float | None, float | None]:
    """Mean gain and mean regression in similarity to the right answer; changes within `band` are ties."""
    if "answer" not in old or "said" not in old or "said" not in new:
        return None, None

    def similar(said: Sequence[str | None]) -> NDArray[np.float64]:
        return np.array([rouge(text or "", answer) for text, answer in zip(said, old["answer"], strict=True)])

    change = similar(new["said"]) - similar(old["said"])
    better, worse = change[change > band], change[change < -band]
    return (float(better.mean()) if len(better) else None), (float(-worse.mean()) if len(worse) else None)
