"""What an ingredient of training costs in a step: switched off, and switched on, against the trunk.

    python benchmarks/ingredients.py [--rounds 40] [--only mixture]

For each ingredient three runs of one recipe stand side by side in one process: the trunk, the ingredient in the recipe but switched off, and switched on.
Each round runs one whole update of each, prepared as the loop prepares it, with its callbacks, in a rotating order; ratios are medians of the
rounds' own ratios, so that what else the machine does in a round falls on all. "Off" against a second trunk shows what the method itself can see.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import record
import torch

from cairn.training import recipe as recipes
from cairn.training.context import Moment
from cairn.training.loggers import Logger
from cairn.training.loop import Trainer
from cairn.training.parallel import World
from cairn.training.sources import fitted, open_data

SIZES = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
LENGTH, BATCH, STEPS = 128, 16, 10_000
CORPORA = {"docs": {"name": "python-docs", "max_bytes": "4 MiB"}, "source": {"name": "python-source", "max_bytes": "4 MiB"}}
Step = Callable[[], None]


def alternating(every: int) -> str:
    """A plan that changes the mixture every so many steps."""
    weights = [{"docs": 0.7, "source": 0.3}, {"docs": 0.3, "source": 0.7}]
    return "data.mixture=" + json.dumps([{"at": f"{step} steps", "weights": weights[number % 2]} for number, step in enumerate(range(every, STEPS, every))])


INGREDIENTS: dict[str, tuple[list[str], list[str]]] = {
    "second trunk": ([], []),
    "mixture, changed every 100 steps": (["data.mixture=[]"], [alternating(100)]),
    "subset": (["data.sources.docs.subset=null"], ["data.sources.docs.subset=500_000"]),
    "repeats": (["callbacks=[]"], ["callbacks=[{name: repeats, every: 100 steps, limit: 1000}]"]),
    "reweighting": (["reweighting=null"], ["reweighting={name: loss-based, warmup: 0 tokens}"]),
    "metadata": (["data.metadata=null"], ["data.metadata={field: source, transform: text, until: 90%}"]),
    "sparse": (["callbacks=[]"], ["callbacks=[{name: sparse, sparsity: 0.75}]"]),
    "infinite schedule": (["schedule.rewarm=0"], ["schedule={name: infinite, warmup: 1%, anneal: 10%, anneal_at: 90%}"]),
}
"""Settings that switch an ingredient off and on. An ingredient's own row goes here."""


def trainer(sizes: dict[str, int], settings: list[str]) -> Trainer:
    values = {
        "model": {"name": "llama", **sizes},
        "data": {"sources": {name: {"corpus": corpus} for name, corpus in CORPORA.items()}, "sequence_length": LENGTH},
        "schedule": {"name": "cosine", "warmup": "1%"},
        "training": {"tokens": f"{STEPS} steps", "batch": BATCH * LENGTH, "compile": False},
    }
    recipe = recipes.load(values, settings)
    tokenizer, feed = open_data(recipe.pinned().data, recipe.seed)
    return Trainer(fitted(recipe, tokenizer).pinned(), tokenizer, feed, World(0, 1, torch.device("cpu")), Logger())


def stepper(each: Trainer) -> Step:
    """One update as the loop makes it: sequences found and packed, gradient, optimizer, callbacks. Nothing is prepared ahead, so that all of it is timed."""
    each._plan_mixture()
    each.model.train()

    def step() -> None:
        each.update(each.micro_batches(each.progress.position))
        moment = Moment(each.progress.step, each.progress.units, last=False)
        for handler in each.handlers:
            handler.after_update(moment)

    return step


def race(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, in rotating order; the first rounds warm up and do not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for index in range(rounds + 3):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            began = time.perf_counter()
            steps[name]()
            if index >= 3:
                times[name].append(time.perf_counter() - began)
    return times


def rows(sizes: dict[str, int], rounds: int, only: str | None) -> Iterator[tuple[list[Any], dict[str, list[float]]]]:
    """A row of the table for each ingredient, with its raw times."""
    for name, (off, on) in INGREDIENTS.items():
        if only is not None and only not in name:
            continue
        settings = {"trunk": [], "off": off, "on": on}
        times = race({label: stepper(trainer(sizes, each)) for label, each in settings.items()}, rounds)
        ratios = [record.median_ratio(times[label], times["trunk"]) for label in ("off", "on")]
        yield [name, round(1000 * statistics.median(times["trunk"]), 2), *ratios], {f"{name}/{label}": each for label, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", help="only ingredients whose name holds this; prints and writes nothing")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that it runs; prints and writes nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    found = list(rows(TINY if arguments.tiny else SIZES, arguments.rounds, arguments.only))
    if arguments.tiny or arguments.only:
        for row, _ in found:
            print(*row)
        return
    record.write(
        "ingredients",
        "What ingredients cost",
        f"python benchmarks/ingredients.py --rounds {arguments.rounds}",
        ["ingredient", "trunk, ms", "off / trunk", "on / trunk"],
        [row for row, _ in found],
        f"One update of a byte-level LLaMA ({SIZES['num_hidden_layers']} layers, width {SIZES['hidden_size']}), batch {BATCH} x {LENGTH}, float32, "
        f"{torch.get_num_threads()} threads, nothing prepared ahead; {arguments.rounds} rounds in rotating order, medians of the rounds' own ratios. "
        "Off is to be 1.00 within 0.02.",
        {name: times for _, raw in found for name, times in raw.items()},
    )


if __name__ == "__main__":
    main()
