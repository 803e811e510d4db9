"""What differs between two checkpoints: configuration, recipe, code, machine, tokenizer, weights block by block, and how they are related."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cairn.checkpoint.format import descent, read
from cairn.checkpoint.format.compare import keys_that_differ
from cairn.checkpoint.format.lazy import LazyTensor
from cairn.checkpoint.format.read import Checkpoint
from cairn.checkpoint.format.summary import shares
from cairn.checkpoint.operating.sameness import vocabulary_digest
from cairn.checkpoint.operating.stream import piecewise
from cairn.checkpoint.operating.walk import widened

_BLOCK = re.compile(r"^(.*?\.(?:layers|h|blocks?|layer)\.\d+)\.")


@dataclass
class Difference:
    """`a` against `b`: keys map to (value in a, value in b); distances are ||b - a|| / ||a|| over the tensors of a block."""

    same_state: bool
    same_model: bool
    relation: str
    steps: tuple[int | None, int | None]
    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    recipe: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """What it was trained on is part of it, under `data`."""
    mixture: tuple[dict[str, float], dict[str, float]] = field(default_factory=lambda: ({}, {}))
    """Shares of the sources in what each was reading."""
    versions: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Code: versions of cairn and of what computes."""
    hardware: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    same_tokenizer: bool = True
    only_in: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    changed_tensors: int = 0
    distances: dict[str, float] = field(default_factory=dict)


def diff(a: str | Path | Checkpoint, b: str | Path | Checkpoint) -> Difference:
    """Compare two checkpoints; streams, so that memory stays bounded by a piece of one tensor."""
    first, second = (item if isinstance(item, Checkpoint) else read.open(item) for item in (a, b))
    result = Difference(
        same_state=first.digest == second.digest,
        same_model=first.model_digest == second.model_digest,
        relation=_relation(first, second),
        steps=(first.step, second.step),
        config=keys_that_differ(first.config, second.config),
        recipe=keys_that_differ(_recipe(first), _recipe(second)),
        mixture=(shares(first), shares(second)),
        versions=_origins_differ("versions", first, second),
        hardware=_origins_differ("hardware", first, second),
        same_tokenizer=vocabulary_digest(first) == vocabulary_digest(second),
    )
    if not result.same_model:
        _compare_tensors(first, second, result)
    return result


def _recipe(checkpoint: Checkpoint) -> dict[str, Any]:
    return checkpoint.lineage.options.get("recipe", {}) if checkpoint.lineage is not None else {}


def _origins_differ(part: str, a: Checkpoint, b: Checkpoint) -> dict[str, tuple[Any, Any]]:
    """What lineage says of both and says otherwise; nothing where one has none."""
    if a.lineage is None or b.lineage is None:
        return {}
    return keys_that_differ(getattr(a.lineage, part), getattr(b.lineage, part))


def _relation(a: Checkpoint, b: Checkpoint) -> str:
    if a.digest == b.digest:
        return "the same state"
    above_a, above_b = ({parent.digest: depth for depth, parent, _ in descent.ancestors(item)} for item in (a, b))
    if a.model_digest == b.model_digest and not (above_a or above_b):
        return "the same model, stored by different programs"
    if a.digest in above_b:
        return f"the first is an ancestor of the second, {above_b[a.digest]} back"
    if b.digest in above_a:
        return f"the second is an ancestor of the first, {above_a[b.digest]} back"
    common = sorted(set(above_a) & set(above_b), key=lambda digest: above_a[digest] + above_b[digest])
    return f"both come from {common[0][:12]}, {above_a[common[0]]} and {above_b[common[0]]} back" if common else "no common ancestor is recorded"


def _compare_tensors(a: Checkpoint, b: Checkpoint, result: Difference) -> None:
    left, right = a.stored, b.stored
    result.only_in = (sorted(set(left) - set(right)), sorted(set(right) - set(left)))
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name in left:
        if name not in right:
            continue
        if left[name].shape != right[name].shape:
            result.shapes[name] = (left[name].shape, right[name].shape)
            continue
        moved, size = _squares(left[name], right[name])
        result.changed_tensors += moved > 0
        match = _BLOCK.match(name)
        total = sums[match[1] if match else name]
        total[0] += moved
        total[1] += size
    result.distances = {block: math.sqrt(moved / size) if size else math.sqrt(moved) for block, (moved, size) in sums.items()}


def _squares(a: LazyTensor, b: LazyTensor) -> tuple[float, float]:
    """Sums of (b - a)^2 and a^2, in float64, piece by piece."""
    moved = size = 0.0
    for begin, end in piecewise(a.spec):
        x, y = (widened(tensor.flat(begin, end)).double() for tensor in (a, b))
        moved += float((y - x).square().sum())
        size += float(x.square().sum())
    return moved, size
