"""What the stabilisers of OLMo 2's recipe cost: the filter of repetitions on the loader's side, z-loss in the step.

    python benchmarks/steady_training.py [--rounds 21]

The shape is that of benchmarks/train_step.py. Each round times an update's sequences without and with the filter, and one eager
step without and with z-loss, in alternating order; ratios are medians of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import record
import torch

from cairn.data.filters.repeats import RepeatFilter
from cairn.data.order.feed import Feed
from cairn.data.text.feed import SourceSpec, TextFeed
from cairn.data.text.tokenizer import resolve_tokenizer
from cairn.data.text.tokens import prepare_cached
from cairn.models.families.olmo2 import Olmo2

SIZES = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 688, "vocab_size": 4096}
LENGTH, BATCH = 256, 16
CORPUS = {"name": "python-source", "max_bytes": "8 MiB"}


def feeds(tokenizer: Any) -> dict[str, Feed]:
    """The same data without and with the filter, for tokens of a BPE or for bytes."""
    tok = resolve_tokenizer(tokenizer, [CORPUS])
    sources = [SourceSpec("source", prepare_cached(CORPUS, tok))]
    return {"off": TextFeed(sources, LENGTH, 0), "on": TextFeed(sources, LENGTH, 0, filters=[RepeatFilter()])}


def steps() -> dict[str, Callable[[], Any]]:
    """One eager training step without and with z-loss, each with a model of its own."""

    def step_of(z_loss: float) -> Callable[[], Any]:
        model = Olmo2(**SIZES, max_position_embeddings=LENGTH).build(0)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
        ids = torch.randint(SIZES["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
        weights = torch.ones(ids.shape)

        def step() -> None:
            (model(ids, targets=ids.roll(-1, 1), weights=weights, z_loss=z_loss).loss / ids.numel()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    return {"off": step_of(0.0), "on": step_of(1e-5)}


def seconds(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def race(actions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Times of each action, one round after the other, the order turned round every time; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for index in range(rounds + 1):
        for name in list(actions)[:: 1 if index % 2 else -1]:
            taken = seconds(actions[name])
            if index:
                times[name].append(taken)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(os.cpu_count() or 1)
    z = race(steps(), rounds)
    step = statistics.median(z["off"])
    rows: list[list[Any]] = [["z-loss, whole step", 1000 * step, 1000 * statistics.median(z["on"]), record.median_ratio(z["on"], z["off"]), "-", "-"]]
    raw: dict[str, Any] = {"z-loss": z}
    for name, tokenizer in (("BPE of 4096", {"bpe": 4096}), ("bytes", "byte")):
        pair = feeds(tokenizer)
        positions = np.arange(50 * BATCH)
        left_out = float((pair["on"].samples(positions).weights.sum(axis=1) == 0).mean())
        # Ten updates each time: one alone is too short for the clock.
        found = race({key: lambda feed=feed: [feed.samples(np.arange(n * BATCH, (n + 1) * BATCH)) for n in range(10)] for key, feed in pair.items()}, rounds)
        off, on = (statistics.median(found[key]) / 10 for key in ("off", "on"))
        rows.append([f"filter, {name}", 1000 * off, 1000 * on, record.median_ratio(found["on"], found["off"]), (on - off) / step, left_out])
        raw[f"filter, {name}"] = found
    record.write(
        "steady_training",
        "Steady training",
        f"python benchmarks/steady_training.py --rounds {rounds}",
        ("", "ms off", "ms on", "on / off", "share of a step", "sequences left out"),
        rows,
        f"OLMo 2, {SIZES['num_hidden_layers']} layers x {SIZES['hidden_size']} wide, sequence {LENGTH}, batch {BATCH}, float32, "
        f"{torch.get_num_threads()} threads, eager; {rounds} rounds in alternating order. "
        "The filter's rows are the loader's time for the sequences of one update of python-source.",
        raw,
    )


if __name__ == "__main__":
    main()
