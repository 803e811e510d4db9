"""Peak memory of a fork beside a plain torch loop on the same model: with a copy of the state, and with checkpoint.capture=off.

python benchmarks/fork_memory.py [--layers 12]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import record

SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8}
PLAIN = """
import json, sys, torch
from cairn.checkpoint.format import read
from cairn.models.families.llama import Llama
torch.set_num_threads(1)
model = read.open(sys.argv[1]).model(dtype=torch.float32).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
for step in range(4):
    ids = torch.randint(0, 257, (8, 65))
    model(ids[:, :-1], targets=ids[:, 1:], weights=torch.ones(8, 64)).loss.div(512).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
"""
FORK = """
import json, sys, torch
from cairn.training.run import fork
torch.set_num_threads(1)
fork(sys.argv[1], sys.argv[2], [f"checkpoint.capture={sys.argv[4]}"], recipe=json.loads(sys.argv[3]), fresh=["optimizer"])
"""
PEAK = "\nimport resource\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"


def peak(code: str, *arguments: str) -> float:
    """Peak resident MiB of a process."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code + PEAK, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1]) / (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dry", action="store_true", help="print, and write no record")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = {
            "model": {"name": "llama", **SIZES, "num_hidden_layers": arguments.layers},
            "data": {"tokenizer": "byte", "sources": {"source": {"corpus": {"name": "python-source", "max_bytes": "1 MiB"}}}, "sequence_length": 64},
            "training": {"tokens": "1 steps", "batch": 512, "compile": False},
        }
        make = "import json, sys\nfrom cairn.training.run import train\ntrain(json.loads(sys.argv[1]), sys.argv[2])"
        peak(make, json.dumps(recipe), str(folder / "base"))
        export = "import sys\nfrom cairn.checkpoint.foreign.export import export\nexport(sys.argv[1], sys.argv[2])"
        peak(export, str(folder / "base"), str(folder / "plain"))
        longer = {**recipe, "training": {**recipe["training"], "tokens": "4 steps"}, "checkpoint": {"every": "2 steps"}}
        plain = peak(PLAIN, str(folder / "plain"))
        rows = [("a plain torch loop", plain, 1.0)]
        for capture in ("off", "lazy"):
            found = peak(FORK, str(folder / "plain"), str(folder / capture), json.dumps(longer), capture)
            rows.append((f"cairn fork, checkpoint.capture={capture}", found, found / plain))
        floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if arguments.dry:
            print(*rows, floor, sep="\n")
            return
        record.write(
            "fork_memory",
            "Memory of a fork",
            f"python benchmarks/fork_memory.py --layers {arguments.layers}",
            ("", "peak MiB", "of a plain loop"),
            rows,
            "A LLaMA is trained for four steps with AdamW in float32, by a plain torch loop and as a fork that saves every second step.",
            {"rows": rows},
        )


if __name__ == "__main__":
    main()
