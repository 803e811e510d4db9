"""What the data side of each objective costs beside a training step, at the shape of `train_step.py`.

    python benchmarks/objective_data.py [--rounds 15] [--small]

Each round measures, for every objective, the arrays of one update made from samples that are there already, and the training step on them.
The data side is made ahead on a thread of its own; here it is measured alone, on one core, which is the most that it can cost.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import numpy as np
import record
import torch

from cairn.data.text.feed import Samples
from cairn.data.text.tokenizer import byte_level
from cairn.models.families.llama import Llama
from cairn.models.families.t5 import T5
from cairn.options import configure
from cairn.randomness import bits
from cairn.training.objectives import Setting

SIZES = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 688, "vocab_size": 4096}
PAIR = {"d_model": 256, "d_kv": 32, "d_ff": 688, "num_layers": 8, "num_heads": 8, "vocab_size": 4096, "feed_forward_proj": "gated-gelu"}
SMALL = {**SIZES, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
SMALL_PAIR = {**PAIR, "d_model": 32, "num_layers": 1, "d_ff": 64}
LENGTH, BATCH = 256, 16
OBJECTIVES = ["causal-lm", "prefix-lm", "span-corruption", "mlm", "ul2"]
WORDS = (
    f"{BATCH} sequences of {LENGTH} tokens; decoders of {SIZES['num_hidden_layers']} layers x {SIZES['hidden_size']} wide, an encoder-decoder of as many "
    "layers in each stack. Median of {rounds} rounds. The arrays are made ahead on another thread; the share is what they would cost if the step had to wait "
    "for them. Aim: at most 3 %."
)


def samples(length: int, batch: int) -> Samples:
    tokens = (bits(0, np.arange(batch * (length + 1))) % np.uint64(256)).astype(np.int64).reshape(batch, length + 1)
    weights, zeros = np.ones((batch, length), np.float32), np.zeros(batch, np.int64)
    return Samples(tokens, None, weights, zeros, zeros, bits(1, np.arange(batch)))


def measured(name: str, network: Any, length: int, batch: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of the arrays and of the step on them, of each round."""
    objective: Any = configure("objective", name)
    objective = objective.fitted(Setting(byte_level().extended(objective.special_tokens()), network, length, False))
    model, given = network.build(0), samples(length, batch)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    data, steps = [], []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        arrays = objective.arrays(given)
        made = time.perf_counter()
        inputs = {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()}
        objective.loss(model, inputs).total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        data.append(made - began)
        steps.append(time.perf_counter() - made)
    return data[1:], steps[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="a tiny setting that shows that it runs; nothing is written")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    rounds = 2 if arguments.small else arguments.rounds
    sizes, pair = (SMALL, SMALL_PAIR) if arguments.small else (SIZES, PAIR)
    networks = {"causal decoder": Llama(**sizes), "prefix decoder": Llama(**sizes, attention="prefix"), "encoder-decoder": T5(**pair)}
    rows: list[list[Any]] = []
    raw: dict[str, Any] = {}
    for title, network in networks.items():
        for name in OBJECTIVES:
            if name == "causal-lm" and title != "causal decoder":
                continue
            data, steps = measured(name, network, LENGTH, BATCH, rounds)
            share = statistics.median(a / b for a, b in zip(data, steps, strict=True))
            rows.append([title, name, round(1000 * statistics.median(data), 2), round(1000 * statistics.median(steps)), f"{100 * share:.2f} %"])
            raw[f"{title}, {name}"] = {"data": data, "step": steps}
    columns = ["model", "objective", "data ms", "step ms", "share"]
    if arguments.small:
        print(*([columns, *rows]), sep="\n")
        return
    command = f"python benchmarks/objective_data.py --rounds {arguments.rounds}"
    record.write("objective_data", "Data side of objectives", command, columns, rows, WORDS.format(rounds=rounds), raw)


if __name__ == "__main__":
    main()
