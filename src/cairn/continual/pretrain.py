"""Going on with a finished checkpoint: on new data with a re-warmed rate, or down a branch for use.

Both are forks. `continue_` keeps the old sources in the recipe, with their share of replay or none, so that every measurement of the
run sees both sides: what is gained on the new data and what is lost on the old ("Continual Pre-Training of Large Language Models: How
to (re)warm your model?").
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from cairn.checkpoint.format import read
from cairn.checkpoint.format.read import Checkpoint
from cairn.continual.plan import TokenBudget
from cairn.device import computes
from cairn.errors import InputError
from cairn.options import Amount
from cairn.training.recipe import Recipe
from cairn.training.run import Run, fork, recipe_to_fork
from cairn.training.starting import one_pass, to_continue

SIZES = ("data.sequence_length", "training.batch", "training.micro_batch")
"""Overrides that say how long a step is."""


@computes
def continue_(
    checkpoint: str | Path | Checkpoint,
    run: str | Path,
    data: Mapping[str, Any],
    tokens: str | Amount | None = None,
    overrides: Iterable[str] = (),
    *,
    schedule: Literal["rewarm", "keep"] = "rewarm",
    rate: float | None = None,
    warmup: str | Amount = "1%",
    final: float = 0.1,
    replay: float = 0.0,
    plan: TokenBudget | None = None,
    fresh: Iterable[Literal["optimizer"]] = (),
    stop_at_step: int | None = None,
    device: Any = None,
    quiet: bool = True,
) -> Run:
    """Continue `checkpoint` on new data for `tokens` more (None: one pass over them), in the new run directory `run`.

    data: corpora by name, in equal shares; replay: share of the sequences that comes from the checkpoint's own sources, in the shares that
    they have there. `rewarm` raises the rate to `rate` (default: the recipe's own) over `warmup` and lets it fall along a cosine to `final`
    of it; `keep` goes on with the schedule of the checkpoint, as an infinite one is meant to be. Moments are kept, unless
    `fresh=["optimizer"]`; lineage says which. `plan` says how the new data are spent.

    A checkpoint that was not trained here needs no recipe: its config, tokenizer, end tokens and dtype are its own, the rest is that of
    `cairn.training.starting.to_continue`, with an optimizer of its own. Raises `InputError` for impossible requests.
    """
    source = checkpoint if isinstance(checkpoint, Checkpoint) else read.open(checkpoint)
    values = starting_values(source, data, rate=rate)
    words: dict[str, Any] = {"schedule": schedule, "rate": rate, "warmup": warmup, "final": final, "replay": replay, "plan": plan}
    given = list(overrides)
    settings = settings_to_continue(source, data, tokens, recipe=values, overrides=given, **words)
    anew = [*fresh, *(["optimizer"] if values is not None and "optimizer" not in fresh else [])]
    return fork(source, run, [*settings, *given], recipe=values, fresh=anew, stop_at_step=stop_at_step, quiet=quiet)  # type: ignore[arg-type]


def starting_values(source: Checkpoint, data: Mapping[str, Any], *, rate: float | None = None) -> dict[str, Any] | None:
    """The recipe with which a checkpoint goes on that says none itself; None where it says one."""
    if source.lineage is not None and "recipe" in source.lineage.options:
        return None
    if not data:
        raise InputError("Name at least one corpus to go on with: NAME=CORPUS, or the path of a text.")
    return to_continue(source, data, rate=rate)


def settings_to_continue(
    checkpoint: str | Path | Checkpoint,
    data: Mapping[str, Any],
    tokens: str | Amount | None = None,
    *,
    recipe: Mapping[str, Any] | None = None,
    overrides: Iterable[str] = (),
    schedule: Literal["rewarm", "keep"] = "rewarm",
    rate: float | None = None,
    warmup: str | Amount = "1%",
    final: float = 0.1,
    replay: float = 0.0,
    plan: TokenBudget | None = None,
) -> list[str]:
    """The settings of the fork that `continue_` makes with these `overrides`, which come behind them."""
    source = checkpoint if isinstance(checkpoint, Checkpoint) else read.open(checkpoint)
    # A step is as long as the new run's.
    before = recipe_to_fork(source, [each for each in overrides if each.partition("=")[0] in SIZES], recipe=recipe)
    _refuse(before, data, replay)
    length, begin = _length(before, tokens) if tokens is not None else _one_pass(before, data, source, recipe), source.units or 0
    sources = {name: {before.data.source_key: corpus, "weight": (1 - replay) / len(data)} for name, corpus in data.items()}
    if plan is not None:
        sources = plan.applied(sources, length, before.data.sample_units)
    held = {name: weight for name, weight in before.weights_at(begin).items() if name not in data}
    total = sum(held.values())
    for name, weight in held.items():
        sources[name] = before.data.sources[name].model_dump(mode="json") | {"weight": replay * weight / total if total else 0.0}
    settings = [f"data.sources={json.dumps(sources, default=str)}", "data.mixture=[]", f"training.{before.unit}={begin + length}"]
    if schedule == "rewarm":
        rise = Amount.parse(warmup).units(before.training.batch, length)
        words = {"name": "rewarm", "warmup": rise, "horizon": length, "start": begin, "final": final}
        settings.append(f"schedule={json.dumps(words)}")
    return settings + ([f"optimizer.lr={rate}"] if rate is not None else [])


@computes
def anneal(
    checkpoint: str | Path | Checkpoint,
    run: str | Path,
    tokens: str | Amount,
    overrides: Iterable[str] = (),
    *,
    final: float = 0.05,
    stop_at_step: int | None = None,
    device: Any = None,
    quiet: bool = True,
) -> Run:
    """Branch off a model for use: from `checkpoint` the rate falls exponentially to `final` of the full one over `tokens`.

    The checkpoint is read and nothing else: the trunk goes on from it as if there were no branch. Any schedule will do; one that
    is not `infinite` is taken to stand still at the rate that it has there. Raises `InputError` if that rate is below `final`.
    """
    settings = settings_to_anneal(checkpoint, tokens, final=final)
    return fork(checkpoint, run, [*settings, *overrides], stop_at_step=stop_at_step, quiet=quiet)


def settings_to_anneal(checkpoint: str | Path | Checkpoint, tokens: str | Amount, *, final: float = 0.05) -> list[str]:
    """The settings of the fork that `anneal` makes."""
    from cairn import catalog

    source = checkpoint if isinstance(checkpoint, Checkpoint) else read.open(checkpoint)
    before = recipe_to_fork(source)
    length, begin = _length(before, tokens), source.units or 0
    rate = before.schedule.factor(begin, before.training.batch)
    if not final < rate:
        raise InputError(f"The rate at {source.path} is {rate:.4g} of the full one, so it cannot fall to {final:.4g}; choose a lower final, or an earlier one.")
    branch = {"anneal": length, "anneal_at": begin, "final": final}
    if catalog.name_of(before.schedule) == "infinite":
        changes = [f"schedule.{key}={value}" for key, value in branch.items()]
    else:
        changes = [f"schedule={json.dumps({'name': 'infinite', 'cooldown': 0, 'constant': rate, **branch})}"]
    return [*changes, f"training.{before.unit}={begin + length}"]


def _length(recipe: Recipe, tokens: str | Amount) -> int:
    """So many tokens (or samples) as whole steps."""
    amount = Amount.parse(tokens)
    if amount.unit not in ("", "steps", recipe.unit) or not amount.value > 0:
        raise InputError(f"How long to go on is written in {recipe.unit} or steps, not as '{amount}'.")
    return amount.steps(recipe.training.batch) * recipe.training.batch


def _one_pass(before: Recipe, data: Mapping[str, Any], source: Checkpoint, recipe: Mapping[str, Any] | None) -> int:
    return before.total_units if recipe is not None else one_pass(before, data, before.data.preprocessor_of(source))


def _refuse(before: Recipe, data: Mapping[str, Any], replay: float) -> None:
    if not data:
        raise InputError("Name at least one corpus to go on with: NAME=CORPUS, or the path of a text.")
    if not 0 <= replay < 1:
        raise InputError(f"replay is the share of the sequences that comes from the old data, at least 0 and below 1, not {replay}.")
    if replay and not set(before.data.sources) - set(data):
        raise InputError("There is nothing to replay: the new data bear the names of all the old ones; give them other names.")
