"""Loss curves of every layout beside that of one process, over 100 steps.

    python benchmarks/layouts.py [--steps 100]

Accumulation, clipping, document masks and an event with tensors are on; sizes do not divide by 3 where they need not. One process with other
micro-batches stands beside them: what it differs from itself by is what another order of additions does, without any layout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record

from cairn.train.run import Run, train

LAYOUTS = {2: ["2x1x1", "1x2x1", "1x1x2"], 3: ["3x1x1", "1x3x1"], 4: ["4x1x1", "1x4x1", "2x2x1", "2x1x2", "1x2x2"]}
MICRO_BATCHES = (64, 96, 128, 192, 384)
WORKER = """
import json, os, sys
import torch.distributed as dist
from cairn.train.run import train
dist.init_process_group("gloo")
for recipe, run, settings in json.loads(sys.argv[1]):
    train(recipe, run, settings)
os._exit(0)
"""


def recipe(steps: int) -> dict[str, Any]:
    return {
        "seed": 7,
        "model": {"name": "llama", "hidden_size": 56, "intermediate_size": 84, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        "data": {
            "tokenizer": "byte",
            "sources": {"source": {"corpus": {"name": "python-source", "max_bytes": "256 KiB"}}},
            "sequence_length": 32,
            "documents": "mask",
        },
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "schedule": {"name": "cosine", "warmup": "5 steps"},
        "training": {"tokens": f"{steps} steps", "batch": 12 * 32, "micro_batch": 32, "clip": 0.5, "compile": False},
        "checkpoint": {"every": f"{steps} steps"},
        "events": [{"name": "ema", "decay": 0.9}],
    }


def gap(run: Path, reference: Path) -> float:
    """Largest relative difference of the two loss curves."""
    ours, theirs = ([row["loss"] for row in Run(path).metrics()] for path in (run, reference))
    assert len(ours) == len(theirs)
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    found = dict[tuple[str, str], float]()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "worker.py").write_text(WORKER)
        for precision in ("float64", "float32"):
            setting = f"training.precision={precision}"
            train(recipe(arguments.steps), folder / precision, [setting])
            for size in MICRO_BATCHES:
                name = f"one process, micro-batches of {size} tokens"
                train(recipe(arguments.steps), folder / f"{precision}-{size}", [setting, f"training.micro_batch={size}"])
                found[precision, name] = gap(folder / f"{precision}-{size}", folder / precision)
            for processes, layouts in LAYOUTS.items():
                jobs = []
                for layout in layouts:
                    keys = [f"parallel.{key}={value}" for key, value in zip(("data", "shard", "tensor"), layout.split("x"), strict=True)]
                    jobs.append([recipe(arguments.steps), str(folder / f"{precision}-{layout}"), [setting, *keys]])
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(folder / "worker.py")]
                subprocess.run([*command, json.dumps(jobs)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
                for layout in layouts:
                    found[precision, layout] = gap(folder / f"{precision}-{layout}", folder / precision)
    rows = [[what, found["float64", what], found["float32", what]] for what in dict.fromkeys(what for _, what in found)]
    record.write(
        "layouts",
        "Every layout, one loss curve",
        f"python benchmarks/layouts.py --steps {arguments.steps}",
        ["data x shard x tensor", "float64", "float32"],
        [*rows, ["allowed", 1e-9, 1e-5]],
        f"Largest relative difference between the loss curve of a layout and that of one process over {arguments.steps} steps, "
        "with accumulation (of 32 tokens), clipping and document masks.",
        {f"{precision} {layout}": value for (precision, layout), value in found.items()},
    )


if __name__ == "__main__":
    main()
