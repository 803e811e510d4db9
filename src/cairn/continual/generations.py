"""Generations of models that learn from each other's text, and what of the old data each keeps.

D real, S_i the text of generation i - 1, each of N tokens. ModelGeneration i + 1 reads

    replace      S_(i+1)                                   accumulate   D + S_2 + ... + S_(i+1)
    subsample    N tokens of that pool, drawn once         mix          share D + (1 - share) S_(i+1)

Pools are mixtures of corpora, so that what was read of which generation is exact and in the checkpoint; a generated corpus names the checkpoint
that wrote it, and so does the lineage of the models that read it. "Is Model Collapse Inevitable?"
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cairn import cache
from cairn.checkpoint.format import read
from cairn.checkpoint.format.read import Checkpoint
from cairn.data import corpora
from cairn.device import choose, computes
from cairn.errors import InputError
from cairn.evaluation.audits.diversity import Diversity, diversity, tail_mass
from cairn.generation.corpus import as_source, write_corpus
from cairn.options import configure
from cairn.randomness import seed_for
from cairn.training import recipe as recipes
from cairn.training.recipe import Recipe
from cairn.training.run import Run, fork, train

Policy = Literal["replace", "accumulate", "subsample", "mix"]
POLICIES: tuple[Policy, ...] = ("replace", "accumulate", "subsample", "mix")


def pool(policy: Policy, generation: int, share: float = 0.5) -> list[float]:
    """How many times N tokens of D, S_2, ..., S_generation a generation reads in one pass."""
    if generation == 1:
        return [1.0]
    old = generation - 1
    if policy == "replace":
        return [0.0] * old + [1.0]
    if policy == "mix":
        return [share] + [0.0] * (old - 1) + [1 - share]
    return [1.0 if policy == "accumulate" else 1 / generation] * generation


@dataclass(frozen=True)
class ModelGeneration:
    """One generation: its run, what it read (tokens of one pass by source), its loss on held-out real text and how much of its rarest tokens it takes
    to be impossible (`diversity.tail_mass`), and the text that it wrote."""

    number: int
    run: Path
    digest: str
    composition: dict[str, float]
    loss: float
    stderr: float
    tail_mass: float
    text: Path | None
    diversity: Diversity | None

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"run": str(self.run), "text": str(self.text) if self.text else None}


@computes
def generations(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    folder: str | Path,
    overrides: Iterable[str] = (),
    *,
    policy: Policy = "accumulate",
    count: int = 5,
    share: float = 0.5,
    longer: bool = True,
    warm_start: bool = False,
    temperature: float = 1.0,
    top_p: float | None = None,
    longest: int = 256,
    batch: int = 64,
    device: Any = None,
    say: Callable[[str], object] = lambda text: None,
) -> list[ModelGeneration]:
    """Train `count` generations under a policy, in `folder`: runs `generation-i`, and texts `text-i` that generation i has written.

    The recipe describes generation 1 and has one source, the real one; its length is for one real corpus. A pool of k corpora is trained k times
    as long, unless `longer=False` gives every generation the same compute. Each begins from scratch with a seed of its own, or, with `warm_start`, from the
    weights of the one before with a fresh optimizer. What lies in `folder` already is found again. All of it computes on `device` (as
    `cairn.device.choose`). Raises `InputError` for impossible requests.
    """
    asked, home = recipes.load(recipe, overrides), Path(folder)
    name = _real(asked, policy, count, share)
    found: list[ModelGeneration] = []
    for number in range(1, count + 1):
        texts = [home / f"text-{i}" for i in range(1, number)]
        wanted, weights = _recipe(asked, name, texts, policy, number, share, longer)
        run = Run(home / f"generation-{number}")
        if not run.path.exists():
            say(f"generation {number}: {', '.join(f'{source} {weight:g}' for source, weight in weights.items())}")
            before = found[-1] if warm_start and found else None
            cache.publish(run.path, functools.partial(_train, wanted, before))
        checkpoint = run.newest()
        text = home / f"text-{number}" if number < count else None
        if text is not None and not text.exists():
            say(f"generation {number} writes")
            size = _bytes(asked, name, checkpoint)
            write_corpus(checkpoint, text, size, temperature=temperature, top_p=top_p, longest=longest, seed=wanted.seed, batch=batch)
        found.append(_seen(number, run, checkpoint, weights, name, asked, text))
    return found


def slope(losses: Iterable[Iterable[float]]) -> tuple[float, float]:
    """The drift: least-squares slope of the loss over the generations, mean over seeds (rows) and its standard error (nan for one)."""
    rows = np.asarray([list(row) for row in losses], np.float64)
    time = np.arange(rows.shape[1]) - (rows.shape[1] - 1) / 2
    each = rows @ time / (time @ time)
    return float(each.mean()), float(each.std(ddof=1) / np.sqrt(len(each))) if len(each) > 1 else float("nan")


def _real(recipe: Recipe, policy: str, count: int, share: float) -> str:
    if len(recipe.data.sources) != 1 or recipe.data.mixture:
        raise InputError(f"Generations begin with one real source and no changes of the mixture; the recipe has {', '.join(recipe.data.sources)}.")
    if policy not in POLICIES or count < 1 or not 0 <= share <= 1:
        raise InputError(
            f"A policy is one of {', '.join(POLICIES)}, over at least one generation, with a share from 0 to 1 (got {policy}, {count}, {share:g})."
        )
    if not recipe.data.held_out:
        raise InputError("Generations are measured on held-out real text; set data.held_out.")
    return next(iter(recipe.data.sources))


def _recipe(asked: Recipe, name: str, texts: list[Path], policy: Policy, number: int, share: float, longer: bool) -> tuple[Recipe, dict[str, float]]:
    """The recipe of a generation, and how many times N tokens of each source it reads in a pass."""
    real = asked.data.sources[name].model_dump(mode="json")
    sources = {name: real} | {f"generation-{i}": {"corpus": as_source(text)} for i, text in enumerate(texts, start=1)}
    weights = dict(zip(sources, pool(policy, number, share), strict=True))
    one_pass = _tokens(asked, name)
    for source, weight in weights.items():
        sources[source] = sources[source] | {"weight": weight}
        if policy == "subsample" and number > 1:
            sources[source]["subset"] = int(weight * one_pass) // asked.data.sequence_length * asked.data.sequence_length
    length = asked.total_steps * (sum(weights.values()) if longer else 1)
    seed = asked.seed if number == 1 else seed_for(asked.seed, "generation", number) % 2**31
    values = {"data.sources": sources, "training.tokens": f"{round(length)} steps", "seed": seed}
    return asked.changed(values), {source: weight for source, weight in weights.items() if weight}


def _tokens(recipe: Recipe, name: str) -> int:
    """Tokens of one pass over the real source."""
    from cairn.training.sources import open_data

    feed = open_data(recipe.data, recipe.seed)[1]
    return feed.epoch_samples[name] * feed.sample_units


def _bytes(recipe: Recipe, name: str, checkpoint: Checkpoint) -> int:
    """Bytes of the whole real source, held-out part included: of a generated one the same share is held out."""
    from cairn.data.text.tokens import prepare_cached

    store = prepare_cached(recipe.data.sources[name].corpus, checkpoint.tokenizer, held_out=recipe.data.held_out)
    return store.train.bytes + store.held_out.bytes


def _train(recipe: Recipe, before: ModelGeneration | None, path: Path) -> None:
    if before is None:
        train(recipe, path)
        return
    parent = read.open(before.run)
    begin, length = parent.tokens or 0, recipe.total_units
    changes = [f"schedule.start={begin} tokens", f"schedule.horizon={length} tokens", f"training.tokens={begin + length} tokens"]
    fork(parent, path, changes, recipe=recipe, fresh=["optimizer"])


def _seen(number: int, run: Run, checkpoint: Checkpoint, weights: dict[str, float], name: str, asked: Recipe, text: Path | None) -> ModelGeneration:
    from cairn.training.sources import open_data

    _, feed = open_data(asked.data, asked.seed, checkpoint.tokenizer)  # the first generation's: the same windows for all
    measure = configure("measurement", "held-out")
    seen = measure.windows(checkpoint.model(device=choose()).eval(), checkpoint.tokenizer, feed)
    loss, asked_for = measure.scores("held-out", seen)[0], seen.weights > 0
    lost = tail_mass(seen.tokens[asked_for], seen.logs[asked_for])
    varied = None
    if text is not None:
        real = (document.text for document in corpora.resolve(asked.data.sources[name].corpus).documents())
        varied = diversity((document.text for document in corpora.resolve(as_source(text)).documents()), real)
    return ModelGeneration(number, run.path, checkpoint.digest, weights, loss.value, loss.stderr, lost, text, varied)
