"""Will it run elsewhere, and as fast? Exports that give the same scores, and what it takes on this machine.

Times say something of one machine only: the machine is stored with them, and a time that does not repeat is marked as unstable.
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cairn.checkpoint.format import building, lineage, read
from cairn.checkpoint.format.read import Checkpoint
from cairn.errors import InputError
from cairn.registry import statements

TOLERANCE = 1e-4
"""Largest difference between scores in float32 that counts as parity."""
STABLE = 0.15
"""Largest spread of the medians of five rounds, relative to their median."""
ROUNDS, CALLS, LENGTH = 5, 7, 64

_PEAK = """
import resource, sys, torch
from cairn.checkpoint.format import read
checkpoint = read.open(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    checkpoint.model()(torch.zeros(1, int(sys.argv[2]), dtype=torch.long))
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def portability(source: str | Path | Checkpoint, *, memory: bool = True, store: bool = True) -> dict[str, Any]:
    """Parity of exports, latency of one reading and rate of generation at batch 1, memory, files and formats; kept beside the checkpoint."""
    import torch

    checkpoint = source if isinstance(source, Checkpoint) else read.open(source)
    model = checkpoint.model(dtype=torch.float32)
    width = int(checkpoint.config["vocab_size"])
    length = min(LENGTH, int(checkpoint.config.get("max_position_embeddings") or LENGTH) // 2 or 1)
    ids = (torch.arange(length) * 7919 % width)[None]
    with torch.no_grad():
        reference = model(ids).logits
        found = {
            "parity": [_parity(name, functools.partial(make, checkpoint, model, ids), reference) for name, make in EXPORTS.items()],
            "latency": latency(lambda: model(ids)) | {"tokens": length},
            "tokens_per_second": _rate(model, ids),
            "peak_bytes": _peak(checkpoint, length) if memory else None,
            "weight_bytes": checkpoint.tensors.nbytes,
            "dtypes": sorted({tensor.spec.dtype for tensor in checkpoint.tensors.values()}),
            "versions": lineage.versions(),
            "hardware": lineage.hardware(),
        }
    if store:
        statements.keep(checkpoint, "portability", found)
    return found


def _transformers(checkpoint: Checkpoint, model: Any, ids: Any) -> Any:
    import torch

    other = building.by_transformers(checkpoint.path, checkpoint.config, checkpoint.tensors, torch.float32, "cpu")
    return other(ids).logits


def _torch_export(checkpoint: Checkpoint, model: Any, ids: Any) -> Any:
    import torch

    class Scores(torch.nn.Module):
        """The model as a function from ids to scores, which is all that an exported program can be."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.model(tokens).logits

    return torch.export.export(Scores(), (ids,)).module()(ids)


EXPORTS: dict[str, Callable[[Checkpoint, Any, Any], Any]] = {"safetensors, by transformers": _transformers, "torch.export": _torch_export}


def _parity(name: str, run: Callable[[], Any], reference: Any) -> dict[str, Any]:
    try:
        scores = run()
    except (InputError, RuntimeError, ValueError, OSError, NotImplementedError) as error:
        return {"format": name, "passed": False, "difference": None, "reason": " ".join(str(error).split())[:300]}
    apart = float((scores.float() - reference.float()).abs().max()) if scores.shape == reference.shape else float("inf")
    return {"format": name, "passed": apart <= TOLERANCE, "difference": apart, "reason": ""}


def latency(call: Callable[[], object], rounds: int = ROUNDS, calls: int = CALLS) -> dict[str, Any]:
    """Median and 95th percentile in seconds over all calls; `stable` when the medians of the rounds lie within 15 % of theirs."""
    call()
    times = [[_timed(call) for _ in range(calls)] for _ in range(rounds)]
    medians = [statistics.median(each) for each in times]
    middle = statistics.median(medians)
    every = sorted(value for each in times for value in each)
    spread = (max(medians) - min(medians)) / middle
    return {"p50": statistics.median(every), "p95": every[min(len(every) - 1, round(0.95 * len(every)))], "spread": spread, "stable": spread <= STABLE}


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _rate(model: Any, ids: Any) -> float:
    from cairn.generation.sample import generate

    new, prompt = 16, ids[0, : max(1, ids.shape[1] // 2)].tolist()
    began = time.perf_counter()
    generate(model, prompt, max_new_tokens=new, temperature=0)
    return new / (time.perf_counter() - began)


def _peak(checkpoint: Checkpoint, length: int) -> int | None:
    """Memory that the model takes beyond the libraries, at batch 1, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", _PEAK, str(checkpoint.path), str(length)], capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    before, after = map(int, done.stdout.split()[-2:])
    # Linux counts in KiB, macOS in bytes.
    return (after - before) * (1 if sys.platform == "darwin" else 1024)
