"""The last share of training as a lever and as a microscope: upsampling small sources in it, and what each source is worth there.

    w_s = base_s * factor_s,  at most cap * c_s / n        c_s tokens of one pass over s, n tokens of the phase; the others share what is left
    effect(s, j) = loss_j without s - loss_j with all      every run from the same checkpoint, over the same tokens and rates

"Does your data spark joy? Performance gains from domain upsampling at the end of training".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cairn import cache
from cairn.checkpoint.format import read
from cairn.checkpoint.format.read import Checkpoint
from cairn.device import computes
from cairn.errors import InputError, suggestion
from cairn.options import Amount
from cairn.training.recipe import Recipe
from cairn.training.run import Run, fork, recipe_to_fork


def upsampled(base: Mapping[str, float], factors: Mapping[str, float], sizes: Mapping[str, int], tokens: int, *, max_epochs: float = 4.0) -> dict[str, float]:
    """Shares for a last phase of `tokens`: each source of `factors` has so many times its share of `base`, but is read `max_epochs` times at most.

    base: weights by source; sizes: tokens of one pass over each. The other sources share the rest as they did. Raises `InputError` for unknown
    sources or where nothing would be left for the others.
    """
    strange = sorted(set(factors) - set(base))
    if strange:
        raise InputError(f"There is no source '{strange[0]}' to upsample.{suggestion(strange[0], base)}")
    total = sum(base.values())
    raised = {name: min(base[name] / total * factor, max_epochs * sizes[name] / tokens) for name, factor in factors.items()}
    others = {name: weight for name, weight in base.items() if name not in factors}
    left, known = 1 - sum(raised.values()), sum(others.values())
    if left < 0 or (left > 1e-12 and not known):
        raise InputError(f"The upsampled sources would take {1 - left:.3g} of the phase; lower their factors, or leave a source for the rest.")
    return {name: raised[name] if name in raised else left * base[name] / known for name in base}


def by_size(sizes: Mapping[str, int], alpha: float = 0.5) -> dict[str, float]:
    """Shares proportional to size^alpha: 1 keeps the sizes, 0 makes all equal."""
    powers = {name: size**alpha for name, size in sizes.items()}
    return {name: power / sum(powers.values()) for name, power in powers.items()}


def without(weights: Mapping[str, float], name: str) -> dict[str, float]:
    """The shares with one source left out; the others keep their ratios. Raises `InputError` if nothing is left."""
    left = sum(weight for other, weight in weights.items() if other != name)
    if not left > 0:
        raise InputError(f"Without '{name}' the mixture is empty.")
    return {other: 0.0 if other == name else weight / left for other, weight in weights.items()}


def passes(weights: Mapping[str, float], sizes: Mapping[str, int], tokens: int) -> dict[str, float]:
    """How often each source is read in `tokens`."""
    total = sum(weights.values())
    return {name: weight / total * tokens / sizes[name] for name, weight in weights.items()}


@dataclass(frozen=True)
class Valuation:
    """What leaving each source out of the last phase did to the loss on each: rows are left out, columns are measured, positive is a help.

    `noise` is the standard deviation of the loss of the whole mixture over orders of the data (nan for one); `counts` says where an
    effect exceeds two of them. `cost` is the share of full trainings that all runs together took.
    """

    losses: dict[str, dict[str, float]]
    effects: dict[str, dict[str, float]]
    noise: dict[str, float]
    counts: dict[str, dict[str, bool]]
    cost: float

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@computes
def ablate_sources(
    checkpoint: str | Path | Checkpoint,
    weights: Mapping[str, float],
    folder: str | Path,
    *,
    tokens: str | Amount | None = None,
    drop: Sequence[str] | None = None,
    orders: int = 3,
    sequences: int = 256,
    overrides: Sequence[str] = (),
    device: Any = None,
    say: Callable[[str], object] = lambda text: None,
) -> Valuation:
    """Value sources by a last phase without each: forks of `checkpoint` over `tokens` (default: to the end of its run) mixed by `weights`.

    weights: for every source of the checkpoint's recipe; drop: the sources to leave out in turn, by default all with a weight. The whole mixture is
    run with `orders` orders of the data, the first of which reads on where the checkpoint was, as the ablated runs do. The schedule is not
    restarted and the moments are kept. Runs stay in `folder` and are found there again; they train on `device` (as `cairn.device.choose`). Raises
    `InputError` for a finished run or weights that do not fit.
    """
    source = checkpoint if isinstance(checkpoint, Checkpoint) else read.open(checkpoint)
    recipe, begin = recipe_to_fork(source), source.tokens or 0
    end = recipe.total_units if tokens is None else begin + Amount.parse(tokens).units(recipe.training.batch)
    _refuse(recipe, weights, begin, end, orders)
    measure = {"name": "evaluate", "every": f"{end} tokens", "measurements": [{"name": "held-out", "sequences": sequences, "by_source": True}]}
    common = [f"training.tokens={end} tokens", f"checkpoint.every={end} tokens", f"callbacks={json.dumps([measure])}", *overrides]

    def losses(name: str, mixed: Mapping[str, float], seed: int) -> dict[str, float]:
        path = Path(folder) / name
        if not path.exists():
            say(f"last phase, {name}")
            change = f"data.mixture={json.dumps([{'at': f'{begin} tokens', 'weights': dict(mixed)}])}"
            settings = [change, *common] + ([f"seed={seed}"] if seed != recipe.seed else [])
            cache.publish(path, lambda hidden: fork(source, hidden, settings))
        return losses_by_source(Run(path))

    whole = [losses(f"all-{order}" if order else "all", weights, recipe.seed + order) for order in range(orders)]
    found = {"all": whole[0]}
    dropped = list(drop) if drop is not None else [name for name, weight in weights.items() if weight]
    for name in dropped:
        found[f"without {name}"] = losses(f"without-{name}", without(weights, name), recipe.seed)
    noise = {name: float(np.std([each[name] for each in whole], ddof=1)) if orders > 1 else math.nan for name in whole[0]}
    effects = {name: {other: found[f"without {name}"][other] - whole[0][other] for other in whole[0]} for name in dropped}
    counts = {name: {other: abs(effect) > 2 * noise[other] for other, effect in row.items()} for name, row in effects.items()}
    return Valuation(found, effects, noise, counts, (len(dropped) + orders) * (end - begin) / end)


def losses_by_source(run: Run) -> dict[str, float]:
    """The last held-out loss of each source that the run's callback `evaluate` found."""
    last = [row for row in run.metrics() if any(key.startswith("held-out/") for key in row)][-1]
    return {key.split("/")[1]: value for key, value in last.items() if key.startswith("held-out/") and key.endswith("/loss") and key.count("/") == 2}


def _refuse(recipe: Recipe, weights: Mapping[str, float], begin: int, end: int, orders: int) -> None:
    strange = sorted(set(weights) ^ set(recipe.data.sources))
    if strange:
        known = ", ".join(recipe.data.sources)
        raise InputError(f"Give a weight to every source of the checkpoint's recipe ({known}) and to nothing else; '{strange[0]}' does not fit.")
    if end <= begin:
        raise InputError(f"The run ends at {end} tokens, where the checkpoint stands; take an earlier one, or give the phase a length with tokens.")
    if orders < 1:
        raise InputError(f"The whole mixture is run in at least one order, not {orders}.")
