"""Training throughput under masks, where the work is equal: the same decoder and batch under a causal, a prefix, and a packed mask.

    python benchmarks/masks.py [--rounds 9] [--small]

Each round runs one step under each mask and each way to compute it, in rotating order; ratios are medians of the rounds' own ratios to the
plainly causal step. Prefix and packed masks are dense boolean ones; FlexAttention (compiled, as it must be) as a block mask.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import record
import torch

from cairn.models import masks
from cairn.models.families.llama import Llama

SIZES = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 688, "vocab_size": 4096}
LENGTH, BATCH = 256, 16
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 176, "vocab_size": 512}
WORDS = (
    "{layers} layers x {width} wide, sequence {length}, batch {batch}, float32, {threads} threads; {rounds} rounds of one step each, in rotating order. The "
    "matrix products are the same under every mask. A prefix is half of the window; packed windows hold four documents, each with a prefix of half of it. "
    "Aim: at least 0.9 of the causal throughput. FlexAttention has no backward pass on a CPU, where cairn takes a dense mask."
)


def given(length: int, batch: int) -> dict[str, masks.Mask | None]:
    """The masks of a batch."""
    ids = (torch.arange(length) * 4 // length)[None].repeat(batch, 1)
    flags = (torch.arange(length) % (length // 4) < length // 8)[None].repeat(batch, 1)
    half = torch.full((batch,), length // 2)
    return {"causal": None, "prefix": masks.prefix(half), "packed": masks.document(ids), "packed prefix": masks.packed_prefix(ids, flags)}


def step_of(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor, mask: masks.Mask | None) -> Callable[[], float]:
    targets = ids.roll(-1, 1)

    def step() -> float:
        loss = model(ids, mask=mask, targets=targets).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def attention_of(plan: masks.MaskPlan, compiled: bool, batch: int, length: int, sizes: dict[str, int]) -> Callable[[], object]:
    """Forward and backward of one layer's attention."""
    heads = sizes["num_attention_heads"]
    q, k, v = (torch.randn(batch, heads, length, sizes["hidden_size"] // heads, requires_grad=True) for _ in range(3))
    attend = torch.compile(masks.attend, dynamic=False) if compiled else masks.attend
    return lambda: torch.autograd.grad(attend(q, k, v, plan).sum(), (q, k, v))


def race(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for action in contestants.values():
        action()
    names = list(contestants)
    for index in range(rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            began = time.perf_counter()
            contestants[name]()
            times[name].append(time.perf_counter() - began)
    return times


def layers(sizes: dict[str, int], length: int, batch: int) -> dict[str, Callable[[], object]]:
    """One layer's attention under every mask, with a dense mask (or none) and, where it runs here, by compiled FlexAttention."""
    device, found = torch.device("cpu"), {}
    for name, mask in given(length, batch).items():
        found[f"{name}, dense mask"] = attention_of(masks.prepare(mask, batch, length, length, device, "sdpa"), False, batch, length, sizes)
        if mask is None:
            continue
        flexible = attention_of(masks.prepare(mask, batch, length, length, device, "flex"), True, batch, length, sizes)
        try:
            flexible()
        except (RuntimeError, NotImplementedError) as error:  # no backward pass of FlexAttention on this device
            print(f"{name}, FlexAttention: {str(error).splitlines()[0]}")
            continue
        found[f"{name}, FlexAttention"] = flexible
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--small", action="store_true", help="a tiny setting that shows that it runs; nothing is written")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    sizes, length, batch = (SMALL, 64, 4) if arguments.small else (SIZES, LENGTH, BATCH)
    architecture = Llama(**sizes, max_position_embeddings=length)
    model, ids = architecture.build(0), torch.randint(sizes["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    steps = race({name: step_of(model, optimizer, ids, mask) for name, mask in given(length, batch).items()}, arguments.rounds)
    alone = race(layers(sizes, length, batch), arguments.rounds)
    rows: list[list[Any]] = []
    for what, times, first in (("training step", steps, "causal"), ("one layer's attention", alone, "causal, dense mask")):
        for name, seconds in times.items():
            rows.append([what, name, round(1000 * statistics.median(seconds), 2), record.median_ratio(times[first], seconds)])
    columns = ["what", "mask", "ms", "throughput over causal"]
    if arguments.small:
        print(*([columns, *rows]), sep="\n")
        return
    words = WORDS.format(
        layers=sizes["num_hidden_layers"],
        width=sizes["hidden_size"],
        length=length,
        batch=batch,
        threads=torch.get_num_threads(),
        rounds=arguments.rounds,
    )
    command = f"python benchmarks/masks.py --rounds {arguments.rounds}"
    record.write("masks", "Attention masks", command, columns, rows, words, {"step": steps, "attention": alone})


if __name__ == "__main__":
    main()
