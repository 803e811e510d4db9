"""A training step of a mixture of experts on a CPU, side by side with transformers' ways to compute experts, in one process.

    python benchmarks/moe.py [--rounds 15] [--tiny]

All start from the same weights and train on the same batch with the same fused AdamW; they take turns in a rotating order. The peers are
transformers' loop over experts (`experts_implementation="eager"`) and its grouped products (`"grouped_mm"`). Losses of the first steps
must agree, else nothing is measured. Ratios are medians of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import record
import torch

from cairn.models.families.olmoe import Olmoe
from cairn.training import allocator

SIZES = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 128, "vocab_size": 4096}
EXPERTS = {"num_experts": 32, "num_experts_per_tok": 4}
LENGTH, BATCH = 256, 8
TINY = {**SIZES, "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
LOOP, GROUPED = "transformers, loop over experts", "transformers, grouped products"
WORDS = (
    "OLMoE of {num_hidden_layers} layers x {hidden_size} wide, {num_experts} experts of {intermediate_size} of which {num_experts_per_tok} are chosen, "
    "vocabulary {vocab_size}, sequence {length}, batch {batch}, float32, {threads} threads, {capability}; {rounds} rounds of one step each, in rotating "
    "order, in one process that keeps memory between steps. Attention of transformers is its scaled_dot_product_attention; losses of the routers are off."
)


def contestants(a: Olmoe, ids: torch.Tensor) -> dict[str, Callable[[], float]]:
    """A training step of each, from the same weights."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    ours = a.build(0)
    steps = {"cairn": _step(ours, lambda: ours(ids[:, :-1], targets=ids[:, 1:]).loss / ids[:, 1:].numel())}
    for name, implementation in ((LOOP, "eager"), (GROUPED, "grouped_mm")):
        theirs = OlmoeForCausalLM._from_config(OlmoeConfig(**a.to_hf()), experts_implementation=implementation).train()
        _same_weights(theirs, a.build(0).state_dict(), a)
        steps[name] = _step(theirs, lambda theirs=theirs: theirs(input_ids=ids, labels=ids, use_cache=False).loss)
    return steps


def _same_weights(theirs: torch.nn.Module, weights: dict[str, torch.Tensor], a: Olmoe) -> None:
    for layer in range(a.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = ([weights.pop(f"{prefix}.{i}.{name}_proj.weight") for i in range(a.num_experts)] for name in ("gate", "up", "down"))
        weights[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        weights[f"{prefix}.down_proj"] = torch.stack(down)
    theirs.load_state_dict(weights)


def _step(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def step() -> float:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.item()

    return step


def race(a: Olmoe, rounds: int) -> dict[str, list[float]]:
    """Seconds of the rounds of each."""
    steps = contestants(a, torch.randint(a.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0)))
    losses = {name: [step() for _ in range(3)] for name, step in steps.items()}
    for name, found in losses.items():
        assert max(abs(x - y) for x, y in zip(found, losses["cairn"], strict=True)) < 1e-3, f"{name} does not compute the same losses: {losses}"
    names, times = list(steps), {name: list[float]() for name in steps}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - began)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="small sizes, nothing is recorded: does it run?")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    allocator.keep()
    sizes = {**(TINY if arguments.tiny else SIZES), **EXPERTS}
    before = os.getloadavg()[0]
    times = race(Olmoe(**sizes, max_position_embeddings=LENGTH), arguments.rounds)
    columns = ["contestant", "ms", "tokens/s", f"x {LOOP}", f"x {GROUPED}"]
    rows = []
    for name, taken in times.items():
        middle = statistics.median(taken)
        rows.append([name, round(1000 * middle), round(BATCH * LENGTH / middle), *(record.median_ratio(times[peer], taken) for peer in (LOOP, GROUPED))])
    if arguments.tiny:
        print(*rows, sep="\n")
        return
    words = WORDS.format(
        **sizes, length=LENGTH, batch=BATCH, threads=torch.get_num_threads(), capability=torch.backends.cpu.get_cpu_capability(), rounds=arguments.rounds
    )
    command = f"python benchmarks/moe.py --rounds {arguments.rounds}"
    load = {"before": before, "after": os.getloadavg()[0]}
    record.write("moe", "Training step of a mixture of experts", command, columns, rows, words, {"times": times, "load_average": load})


if __name__ == "__main__":
    main()
