"""Whether two checkpoints lie in one basin: the loss on the straight line between them.

    barrier = max over a in [0, 1] of L(a x + (1 - a) y) - (a L(x) + (1 - a) L(y))

An average is worth making where the barrier is small beside what the checkpoints have learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from cairn.checkpoint.format.read import Checkpoint
from cairn.device import computes
from cairn.errors import InputError
from cairn.merging.methods.linear import LinearMerge
from cairn.merging.target import Bench, MergeTarget


@dataclass(frozen=True)
class Barrier:
    """Values on the line from y (share 0 of x) to x (share 1), and by how much the worst lies beyond the line between the ends."""

    shares: list[float]
    losses: list[float]
    height: float

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def barrier(loss: Callable[[float], float], points: int = 11) -> Barrier:
    """The barrier of `loss`, a function of the share of x, on `points` evenly spaced shares; 0 where the line never rises above its ends.

    Raises `InputError` for fewer than three points, since the ends alone have no barrier between them, and for a loss that is no
    finite number: nothing can be said of how high that lies.
    """
    if points < 3:
        raise InputError(f"A barrier is looked for at three points or more, not {points}.")
    shares = [number / (points - 1) for number in range(points)]
    losses = [loss(share) for share in shares]
    for share, value in zip(shares, losses, strict=True):
        if not math.isfinite(value):
            raise InputError(f"The loss at share {share:g} of the first is {value}, so there is no barrier to tell.")
    rises = [value - (share * losses[-1] + (1 - share) * losses[0]) for share, value in zip(shares, losses, strict=True)]
    return Barrier(shares, losses, max(0.0, *rises[1:-1]))


@computes
def between(x: Checkpoint, y: Checkpoint, objective: MergeTarget, points: int = 11, *, device: Any = None) -> Barrier:
    """The barrier between two checkpoints by the objective's measurement; merges are made in memory and nothing is written.

    Where more of the metric is better, its negative is the loss. Raises `MismatchError` for checkpoints that do not fit together.
    """
    bench = Bench([x, y])
    sign = 1 if objective.lower else -1
    return barrier(lambda share: sign * bench.score(LinearMerge(weights=[share, 1 - share]), objective.select).value, points)
