"""Scoring every checkpoint of a run on four tasks: the whole of `evaluate` against the time that its forward passes alone take.

`--small` checks in seconds that everything works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import record
import torch

from cairn.evaluation import engine, reading
from cairn.evaluation.measure import evaluate
from cairn.training.run import train


def recipe(steps: int) -> dict[str, Any]:
    """A run of the demo's size with 27 checkpoints."""
    return {
        "seed": 0,
        "model": {"name": "llama", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2},
        "data": {"tokenizer": {"bpe": 2048}, "sources": {"docs": {"corpus": {"name": "python-docs", "max_bytes": "4 MiB"}}}, "sequence_length": 128},
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "schedule": {"name": "constant", "warmup": "5 steps"},
        "training": {"tokens": f"{steps} steps", "batch": 1024, "compile": False},
        "checkpoint": {"every": "2 steps"},
    }


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="check only that everything works")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pairs, count = (2, 3) if options.small else (20, 27)
    tasks = [{"name": "blimp", "pairs": pairs}, {"name": "gsm8k", "problems": 10 * pairs}, {"name": "next-line", "places": 10 * pairs}, {"name": "held-out"}]
    spent = [0.0]
    plain = reading.way_of

    def timed(model: Any) -> reading.Way:
        way = plain(model)

        def read(*arrays: Any) -> Any:
            begin = time.perf_counter()
            found = way.read(*arrays)
            spent[0] += time.perf_counter() - begin
            return found

        return reading.Way(read, way.packs, way.batches, way.longest)

    with tempfile.TemporaryDirectory() as folder:
        run = train(recipe(2 * count), Path(folder) / "run")
        reading.way_of = timed  # type: ignore[assignment]
        begin = time.perf_counter()
        rows = evaluate(run.path, tasks)
        whole = time.perf_counter() - begin
        begin = time.perf_counter()
        again = evaluate(run.path, tasks)
        second = time.perf_counter() - begin
    assert again == rows
    print(f"{len(rows)} rows, plans kept: {len(engine._plans)}")
    if options.small:
        print(whole, spent[0], second)
        return
    record.write(
        "score_run",
        "Scoring the checkpoints of a run",
        f"python benchmarks/score_run.py --threads {options.threads}",
        ("checkpoints", "tasks", "seconds", "of it forward passes", "ratio", "asked again, seconds"),
        [[count, len(tasks), whole, spent[0], whole / spent[0], second]],
        "27 checkpoints of a 4-layer LLaMA of width 192 on BLiMP (20 pairs of each paradigm), 200 GSM8K problems, 200 places of next line and held-out loss.",
        {"whole": whole, "model": spent[0], "again": second},
    )


if __name__ == "__main__":
    main()
