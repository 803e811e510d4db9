"""Growing a checkpoint beside a plain copy of as many bytes as the growth reads and writes.

    python benchmarks/grow.py [--rounds 3] [--layers 21] [--width 1024] [--folder DIR] [--tiny]

The small model lies in the page cache. Each contestant runs in a process of its own, in a rotating order in each round, and ends with its
result flushed to disk. The copy writes the bytes of the large model: file by file, in blocks of 8 MiB. Peak memory is anonymous memory alone,
taken at every tensor; `ligo` runs with its maps as they begin, since learning them is training.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record
import torch

from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.saving import write
from cairn.options import configure

METHODS: dict[str, dict[str, Any]] = {
    "stack": {"factor": 2},
    "zero": {"factor": 2},
    "masked": {"factor": 2, "mask": 1},
    "ligo": {"factor": 2, "steps": 0},
    "split": {"width": 2},
}
CONTESTANT = """
import json, os, sys, time
from cairn.growth.enlarge import grow
method, options, small, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
private = lambda: 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])
import torch
from cairn.checkpoint.operating import stream
from cairn.growth.methods import stack, split, zero, masked, ligo
began, before, peak = time.perf_counter(), private(), [0]
grow(method, small, out, options, progress=lambda *_: peak.append(private()))
print(time.perf_counter() - began, max(peak) - before)
"""
COPY = """
import os, sys, time
small, out, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
began = time.perf_counter()
with open(small, "rb") as source, open(out, "wb") as target:
    left = size
    while left:
        block = source.read(min(left, 8 * 2**20))
        if not block:
            source.seek(0)
            continue
        left -= target.write(block)
    target.flush()
    os.fsync(target.fileno())
print(time.perf_counter() - began, 0)
"""


def build(folder: Path, layers: int, width: int) -> Path:
    """A LLaMA of `layers` layers as a checkpoint."""
    sizes = {"vocab_size": 32_000, "hidden_size": width, "intermediate_size": width * 8 // 3 // 64 * 64, "num_hidden_layers": layers}
    architecture = configure("architecture", {"name": "llama", **sizes, "num_attention_heads": width // 64})
    torch.manual_seed(0)
    model = {name: torch.randn(parameter.shape) * 0.02 for name, parameter in architecture.meta_model().named_parameters()}
    return write.save(folder / "small", model=model, config=architecture.to_hf(), lineage=Lineage.record("run", "train")).path


def timed(code: str, *arguments: str) -> tuple[float, float]:
    """Seconds and peak bytes of one contestant in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    seconds, peak = done.stdout.split()
    return float(seconds), float(peak)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=21)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--folder", help="where checkpoints go, on the disk that is to be measured")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that it runs; prints and writes nothing")
    arguments = parser.parse_args()
    layers, width = (2, 128) if arguments.tiny else (arguments.layers, arguments.width)
    base = Path(tempfile.mkdtemp(prefix="cairn-grow-", dir=arguments.folder))
    raw: dict[str, list[float]] = {}
    rows, sizes, peaks = [], dict[str, int](), dict[str, float]()
    try:
        small = build(base, layers, width)
        for method, options in METHODS.items():  # once, to know the sizes and to warm the cache
            timed(CONTESTANT, method, json.dumps(options), str(small), str(base / "out"))
            sizes[method] = size_of(base / "out")
            shutil.rmtree(base / "out")
        for index in range(arguments.rounds):
            names = list(METHODS)
            for method in names[index % len(names) :] + names[: index % len(names)]:
                seconds, peak = timed(CONTESTANT, method, json.dumps(METHODS[method]), str(small), str(base / "out"))
                shutil.rmtree(base / "out")
                copy, _ = timed(COPY, str(small / "model.safetensors"), str(base / "copy"), str(sizes[method]))
                os.unlink(base / "copy")
                raw.setdefault(f"{method}/seconds", []).append(seconds)
                raw.setdefault(f"{method}/copy", []).append(copy)
                peaks[method] = max(peaks.get(method, 0), peak)
        for method in METHODS:
            speed = record.median_ratio(raw[f"{method}/copy"], raw[f"{method}/seconds"])
            rows.append([method, round(sizes[method] / 1e9, 2), statistics.median(raw[f"{method}/seconds"]), speed, round(peaks[method] / 2**20)])
        held = size_of(small) / 1e9
    finally:
        shutil.rmtree(base, ignore_errors=True)
    if arguments.tiny:
        for row in rows:
            print(*row)
        return
    record.write(
        "grow",
        "Growing a checkpoint beside copying its bytes",
        f"python benchmarks/grow.py --rounds {arguments.rounds} --layers {layers} --width {width}",
        ["growth", "result, GB", "seconds", "speed / copy", "peak memory, MiB"],
        rows,
        f"A LLaMA of {held:.2f} GB in float32 ({layers} layers, width {width}), made twice as deep (`split`: twice as wide). Speed is that of a "
        "plain copy of as many bytes as the large model has, flushed to disk, in the same round; the growth also digests every block. To reach: 0.7 of "
        "it, in constant memory.",
        raw | {f"{method}/peak": [peak] for method, peak in peaks.items()},
    )


if __name__ == "__main__":
    main()
