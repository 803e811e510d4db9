"""Training throughput of one step on a CPU, side by side with transformers in one process.

    python benchmarks/train_step.py [--rounds 15] [--out docs/benchmarks]

All contestants start from the same weights and train on the same batch; each round runs one step of each, in a rotating
order, and measures the rate of a large matrix product. Ratios are medians of the rounds' own ratios, so that what else the
machine does in a round falls on all. A share counts the matrix products of the model alone: causal attention counts half,
recomputation and everything element-wise count nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cairn.models.families.llama import Llama
from cairn.models.linear import available, product

SIZES = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 688, "vocab_size": 4096}
LENGTH, BATCH, LARGE = 256, 16, 2048
Step = Callable[[], float]


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


def race(rounds: int) -> dict[str, Any]:
    architecture = Llama(**SIZES, max_position_embeddings=LENGTH)
    steps = {
        "cairn, compiled": ours(architecture, compiled=True),
        "cairn, eager": ours(architecture, compiled=False),
        "transformers, compiled, fused AdamW": theirs(architecture, compiled=True),
        "transformers, eager, default AdamW": theirs(architecture, compiled=False),
    }
    first = {name: step() for name, step in steps.items()}
    assert max(first.values()) - min(first.values()) < 1e-4, f"the contestants do not compute the same loss: {first}"
    products = large_products()
    for action in (*steps.values(), *products.values()):
        action()
    times: dict[str, list[float]] = {name: [] for name in (*steps, *products)}
    names = list(steps)
    for index in range(rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            times[name].append(seconds(steps[name]))
        for name, action in products.items():
            times[name].append(min(seconds(action) for _ in range(3)))
    flops = architecture.flops_per_token(LENGTH) * BATCH * LENGTH
    return {"times": times, "steps": names, "flops": flops, "parameters": architecture.parameter_count()}


def table(result: dict[str, Any]) -> list[dict[str, Any]]:
    times, rows = result["times"], []
    products = [name for name in times if name not in result["steps"]]

    def ratio(name: str, other: str, factor: float = 1.0) -> float:
        return statistics.median(factor * b / a for a, b in zip(times[name], times[other], strict=True))

    for name in result["steps"]:
        middle = statistics.median(times[name])
        row: dict[str, Any] = {"contestant": name, "milliseconds": round(1000 * middle), "fastest": round(1000 * min(times[name]))}
        row["tokens_per_second"] = round(BATCH * LENGTH / middle)
        for other in result["steps"][2:]:
            row[f"speed against {other}"] = round(ratio(name, other), 2)
        for other in products:
            row[f"share of {other} rate"] = round(ratio(name, other, result["flops"] / (2 * LARGE**3)), 3)
        rows.append(row)
    return rows


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor()


def report(result: dict[str, Any], load: tuple[float, float]) -> dict[str, Any]:
    rates = {name: round(2 * LARGE**3 / statistics.median(v) / 1e9, 1) for name, v in result["times"].items() if name not in result["steps"]}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads(), "cores": os.cpu_count(), "capability": torch.backends.cpu.get_cpu_capability()},
        "load_average": {"before": round(load[0], 2), "after": round(load[1], 2)},
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
        "model": {**SIZES, "parameters": result["parameters"]},
        "batch": {"sequences": BATCH, "length": LENGTH, "precision": "float32"},
        "gflop_per_step": round(result["flops"] / 1e9, 1),
        "gflops_of_a_large_product": rates,
        "rounds": len(result["times"][result["steps"][0]]),
        "rows": table(result),
    }


def markdown(document: dict[str, Any]) -> str:
    columns = list(document["rows"][0])
    machine, versions = document["machine"], document["versions"]
    rates = ", ".join(f"{rate} GFLOP/s by {name}" for name, rate in document["gflops_of_a_large_product"].items())
    lines = [
        "# Training step",
        "",
        f"{SIZES['num_hidden_layers']} layers x {SIZES['hidden_size']} wide, vocabulary {SIZES['vocab_size']}, sequence {LENGTH}, batch {BATCH}, float32; "
        f"{document['rounds']} rounds of one step each, medians. {machine['cpu']}, {machine['threads']} threads; torch {versions['torch']}, "
        f"transformers {versions['transformers']}; {document['date']}; load average {document['load_average']['before']} before, "
        f"{document['load_average']['after']} after. A product of two {LARGE} x {LARGE} matrices runs at {rates} in the same process.",
        "",
        "| " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(str(row[column]) for column in columns) + " |" for row in document["rows"]),
        "",
        "Shares count the matrix products of the model alone (causal attention counts half, recomputation and element-wise work nothing).",
        "Made by `python benchmarks/train_step.py`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    before = os.getloadavg()[0]
    result = race(options.rounds)
    document = report(result, (before, os.getloadavg()[0]))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "train_step.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (options.out / "train_step.md").write_text(markdown(document), encoding="utf-8")
    print(markdown(document))


if __name__ == "__main__":
    main()
