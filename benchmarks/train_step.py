"""Training throughput of one step on a CPU, side by side with transformers.

    python benchmarks/train_step.py [--rounds 15]

All contestants start from the same weights and train on the same batch, each in a process of its own, for what the
allocator did for one would change the others; they take turns, so that only one works at a time. Each round runs one step
of each, in a rotating order, and measures the rate of a large matrix product. Ratios are medians of the rounds' own ratios,
so that what else the machine does in a round falls on all. A share counts the matrix products of the model alone: causal
attention counts half, recomputation and everything element-wise count nothing.

Ours run as `cairn train` runs them, memory kept between steps (`cairn.training.allocator`); transformers' loops run as they
come, and once more with memory kept the same way.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import record
import torch

from cairn.models.families.llama import Llama
from cairn.models.kernels import attention
from cairn.models.kernels.linear import available, product
from cairn.training import allocator

SIZES = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 688, "vocab_size": 4096}
LENGTH, BATCH, LARGE = 256, 16, 2048
Step = Callable[[], float]
WORDS = (
    f"{{num_hidden_layers}} layers x {{hidden_size}} wide, vocabulary {{vocab_size}}, sequence {LENGTH}, batch {BATCH}, float32, {{threads}} threads, "
    f"{{capability}}, {{kernel}} kernel of attention; {{rounds}} rounds of one step each, in rotating order, each contestant in its own process. Times are "
    "medians, ratios are medians of the rounds' own ratios. "
    f"A product of two {LARGE} x {LARGE} matrices runs at {{rates}} in the same rounds; shares of that rate count the matrix products of the model alone: "
    "causal attention counts half, recomputation and element-wise work nothing. Memory kept: what a step frees is kept for the next one, as `cairn train` does."
)


def batch() -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def step_of(loss: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer) -> Step:
    def step() -> float:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.item()

    return step


def ours(architecture: Llama, *, compiled: bool) -> Step:
    """Our decoder with fused AdamW."""
    model, ids = architecture.build(0), batch()
    run = torch.compile(model, dynamic=False) if compiled else model
    targets, weights = ids.roll(-1, 1), torch.ones(ids.shape)
    weights[:, -1] = 0
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    return step_of(lambda: run(ids, targets=targets, weights=weights).loss / (BATCH * (LENGTH - 1)), optimizer)


def theirs(architecture: Llama, *, compiled: bool) -> Step:
    """transformers' LlamaForCausalLM: as it comes with default AdamW, or compiled with fused AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model, ids = LlamaForCausalLM(LlamaConfig(**architecture.to_hf())).train(), batch()
    model.load_state_dict(architecture.build(0).state_dict())
    run = torch.compile(model, dynamic=False) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True if compiled else None)
    return step_of(lambda: run(input_ids=ids, labels=ids, use_cache=False).loss, optimizer)


def seconds(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def large_products() -> dict[str, Callable[[], Any]]:
    a, b = torch.randn(LARGE, LARGE), torch.randn(LARGE, LARGE)
    products: dict[str, Callable[[], Any]] = {"torch.mm": lambda: torch.mm(a, b)}
    if available():
        products["oneDNN"] = lambda: product(a, b)
    return products


CONTESTANTS: dict[str, Callable[[Llama], Step]] = {
    "cairn, compiled": lambda a: ours(a, compiled=True),
    "cairn, eager": lambda a: ours(a, compiled=False),
    "transformers, compiled, fused AdamW": lambda a: theirs(a, compiled=True),
    "transformers, eager, default AdamW": lambda a: theirs(a, compiled=False),
    "transformers, compiled, memory kept": lambda a: theirs(a, compiled=True),
    "transformers, eager, memory kept": lambda a: theirs(a, compiled=False),
}
PEERS = list(CONTESTANTS)[2:4]
KEEPS = ("cairn", "memory kept")


def architecture() -> Llama:
    return Llama(**SIZES, max_position_embeddings=LENGTH)


def serve(name: str, link: Connection) -> None:
    """A contestant's process: the losses of three steps to warm up, then the seconds of a step, or of each product, whenever asked."""
    torch.set_num_threads(os.cpu_count() or 1)
    if any(word in name for word in KEEPS):
        allocator.keep()
    if name in CONTESTANTS:
        step = CONTESTANTS[name](architecture())
        link.send([step() for _ in range(3)])
        while link.recv():
            link.send(seconds(step))
    else:
        products = large_products()
        link.send([min(seconds(action) for _ in range(3)) for action in products.values()])
        while link.recv():
            link.send({name: min(seconds(action) for _ in range(3)) for name, action in products.items()})


class Turns:
    """The processes of the contestants, of which one works at a time."""

    def __init__(self, names: list[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.links, self.first = {}, {}
        for name in names:
            link, theirs = context.Pipe()
            context.Process(target=serve, args=(name, theirs), daemon=True).start()
            self.links[name], self.first[name] = link, link.recv()

    def __call__(self, name: str) -> Any:
        self.links[name].send(True)
        return self.links[name].recv()


def race(rounds: int) -> dict[str, Any]:
    steps = list(CONTESTANTS)
    turn = Turns([*steps, "products"])
    losses = [turn.first[name] for name in steps]
    assert max(abs(a - b) for other in losses for a, b in zip(losses[0], other, strict=True)) < 1e-4, (
        f"the contestants do not compute the same losses: {losses}"
    )
    times: dict[str, list[float]] = {name: [] for name in (*steps, *turn("products"))}
    for index in range(rounds):
        for name in steps[index % len(steps) :] + steps[: index % len(steps)]:
            times[name].append(turn(name))
        for name, taken in turn("products").items():
            times[name].append(taken)
    flops = architecture().flops_per_token(LENGTH) * BATCH * LENGTH
    return {"times": times, "steps": steps, "flops": flops, "parameters": architecture().parameter_count()}


def table(result: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    times, steps = result["times"], result["steps"]
    products = [name for name in times if name not in steps]
    columns = ["contestant", "ms", "tokens/s", *(f"x {name}" for name in PEERS), *(f"share of {name}" for name in products)]
    rows = []
    for name in steps:
        middle = statistics.median(times[name])
        against = [record.median_ratio(times[other], times[name]) for other in PEERS]
        shares = [record.median_ratio(times[other], times[name]) * result["flops"] / (2 * LARGE**3) for other in products]
        rows.append([name, round(1000 * middle), round(BATCH * LENGTH / middle), *against, *shares])
    return columns, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    before = os.getloadavg()[0]
    result = race(arguments.rounds)
    rates = {name: 2 * LARGE**3 / statistics.median(v) / 1e9 for name, v in result["times"].items() if name not in result["steps"]}
    columns, rows = table(result)
    record.write(
        "train_step",
        "Training step",
        f"python benchmarks/train_step.py --rounds {arguments.rounds}",
        columns,
        rows,
        WORDS.format(
            **SIZES,
            threads=torch.get_num_threads(),
            kernel="our" if attention.lanes() else "torch's",
            capability=torch.backends.cpu.get_cpu_capability(),
            rounds=arguments.rounds,
            rates=" and ".join(f"{rate:.0f} GFLOP/s ({name})" for name, rate in rates.items()),
        ),
        {**result, "load_average": {"before": before, "after": os.getloadavg()[0]}},
    )


if __name__ == "__main__":
    main()
