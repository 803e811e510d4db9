"""Memory and time of an import: a 100M-parameter ZeRO-1 folder with AdamW moments (1.2 GB), beside reading all of it into memory.

    python benchmarks/import_memory.py [--parameters 100000000] [--rounds 3] [--folder DIR]

Each contestant runs in a process of its own; the figure is the largest resident memory beyond what importing torch takes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import record
import torch

ROWS = 2000
# Not ru_maxrss: that one survives exec and so holds the parent's peak.
BEGIN = """
import json, sys, time, torch
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
base, began = peak(), time.perf_counter()
"""
END = "\nprint(json.dumps([peak() - base, time.perf_counter() - began]))"
OURS = (
    "from cairn.checkpoint.foreign.importing import import_\nimport_(sys.argv[1], sys.argv[2], layout='deepspeed', config={'model_type': 'none'}, pickles=True)"
)
WHOLE = """
from pathlib import Path
files = [torch.load(path, weights_only=False) for path in sorted(Path(sys.argv[1]).glob("*/*optim_states.pt"))]
states = [file["optimizer_state_dict"] for file in files]
flat = torch.cat([state["single_partition_of_fp32_groups"][0] for state in states])
moments = [torch.cat([state["base_optimizer_state"]["state"][0][key] for state in states]) for key in ("exp_avg", "exp_avg_sq")]
torch.save([flat, *moments], sys.argv[2])
"""


def folder(path: Path, parameters: int, ranks: int = 2) -> int:
    """A ZeRO-1 folder of plain values; returns the bytes of its largest tensor."""
    each = 4_000_000
    names = [f"layer.{i}.weight" for i in range(max(1, parameters // each))]
    shapes = {name: torch.Size((ROWS, each // ROWS)) for name in names}
    tag = path / "global_step1"
    tag.mkdir(parents=True)
    (path / "latest").write_text("global_step1")
    module = {name: torch.empty(0) for name in names}
    torch.save({"module": module, "param_shapes": [shapes], "mp_world_size": 1, "dp_world_size": ranks}, tag / "mp_rank_00_model_states.pt")
    local = -(-len(names) * each // ranks)
    for rank in range(ranks):
        state = {key: torch.randn(local) for key in ("exp_avg", "exp_avg_sq")} | {"step": torch.tensor(1.0)}
        held = {"partition_count": [ranks], "single_partition_of_fp32_groups": [torch.randn(local)], "base_optimizer_state": {"state": {0: state}}}
        torch.save({"optimizer_state_dict": held}, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return 4 * each


def measured(program: str, source: Path, out: Path) -> tuple[float, float]:
    """MiB and seconds of one process."""
    done = subprocess.run([sys.executable, "-c", BEGIN + program + END, str(source), str(out)], capture_output=True, text=True, check=True)
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    memory, seconds = json.loads(done.stdout)
    return memory, seconds


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as work:
        source, out = Path(work) / "zero", Path(work) / "out"
        largest = folder(source, asked.parameters)
        rounds = [(measured(OURS, source, out), measured(WHOLE, source, out)) for _ in range(asked.rounds)]
    ours, whole = ([pair[i] for pair in rounds] for i in (0, 1))
    bound = 2 * largest / 2**20 + 200
    total = 12 * asked.parameters / 2**20
    rows = [
        ("cairn import", statistics.median(m for m, _ in ours), bound, statistics.median(s for _, s in ours)),
        ("all in memory (torch.load, cat, torch.save)", statistics.median(m for m, _ in whole), "", statistics.median(s for _, s in whole)),
    ]
    words = f"A ZeRO-1 folder of {total:.0f} MiB over two ranks; the largest tensor has {largest / 2**20:.0f} MiB. Aim: 2 x the largest + 200 MiB. Not flushed."
    raw = {"ours": ours, "whole": whole}
    columns = ("what", "peak MiB", "aim, MiB", "seconds")
    record.write("import_memory", "Memory of an import", "python benchmarks/import_memory.py", columns, rows, words, raw)


if __name__ == "__main__":
    main()
