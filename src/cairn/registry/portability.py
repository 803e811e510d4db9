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
from cairn.device import choose, computes
from cairn.errors import CairnError, InputError
from cairn.registry import statements

ROUNDINGS = 4.0
"""An export may lie this many times as far from the scores in float64 as our own in float32 do."""
FLOOR = 16 * 2.0**-23
"""Distance, relative to the largest score, that is rounding however near our own scores happen to lie."""
STABLE = 0.15
"""Largest spread of the medians of five rounds, relative to their median."""
ROUNDS, CALLS, LENGTH = 5, 7, 64

_PEAK = """
import sys, torch
from cairn.checkpoint.format import read
from cairn.registry.portability import peak_of_process
checkpoint = read.open(sys.argv[1])
before = peak_of_process()
with torch.no_grad():
    checkpoint.model(device="cpu")(torch.zeros(1, int(sys.argv[2]), dtype=torch.long))
print(before, peak_of_process())
"""


@computes
def portability(source: str | Path | Checkpoint, *, memory: bool = True, store: bool = True, device: Any = None) -> dict[str, Any]:
    """Parity of exports, latency of one reading and rate of generation at batch 1 on `device` (as `cairn.device.choose`), memory of the
    processor, files and formats; kept beside the checkpoint."""
    import torch

    checkpoint = source if isinstance(source, Checkpoint) else read.open(source)
    if not isinstance(checkpoint.config.get("vocab_size"), int):
        family = checkpoint.config.get("model_type")
        raise InputError(f"{checkpoint.path}: portability is measured on tokens, and config.json of this '{family}' has no vocab_size.")
    where = choose()
    model = checkpoint.model(dtype=torch.float32, device=where)
    width = int(checkpoint.config["vocab_size"])
    length = min(LENGTH, int(checkpoint.config.get("max_position_embeddings") or LENGTH) // 2 or 1)
    ids = (torch.arange(length) * 7919 % width)[None].to(where)
    with torch.no_grad():
        exact = _exact(checkpoint, ids)
        own = float((model(ids).logits.cpu().double() - exact).abs().max())
        allowed = max(ROUNDINGS * own, FLOOR * float(exact.abs().max()))
        found = {
            "parity": [_parity(name, functools.partial(make, checkpoint, model, ids), exact, allowed) for name, make in EXPORTS.items()],
            "own_difference": own,
            "allowed_difference": allowed,
            "latency": latency(lambda: model(ids)) | {"tokens": length},
            "tokens_per_second": _rate(model, ids),
            "peak_bytes": _peak(checkpoint, length) if memory else None,
            "weight_bytes": checkpoint.tensors.nbytes,
            "dtypes": sorted({tensor.spec.dtype for tensor in checkpoint.tensors.values()}),
            "versions": lineage.versions(),
            "hardware": lineage.hardware() | {"device": str(where)},
        }
    if store:
        statements.keep(checkpoint, "portability", found)
    return found


def _transformers(checkpoint: Checkpoint, model: Any, ids: Any) -> Any:
    import torch

    other = building.by_transformers(checkpoint.path, checkpoint.config, checkpoint.tensors, torch.float32, ids.device)
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


def _exact(checkpoint: Checkpoint, ids: Any) -> Any:
    """The scores in float64, which every other way to compute them is held against, on the processor, which always has them; the model is let go at once."""
    import torch

    return checkpoint.model(dtype=torch.float64, device="cpu")(ids.cpu()).logits


def _parity(name: str, run: Callable[[], Any], exact: Any, allowed: float) -> dict[str, Any]:
    try:
        scores = run()
    except (CairnError, RuntimeError, ValueError, TypeError, OSError, NotImplementedError) as error:
        return {"format": name, "passed": False, "difference": None, "reason": " ".join(str(error).split())[:300]}
    if scores.shape != exact.shape:
        return {"format": name, "passed": False, "difference": None, "reason": f"scores of shape {list(scores.shape)}, not {list(exact.shape)}"}
    apart = float((scores.cpu().double() - exact).abs().max())
    reason = "" if apart <= allowed else f"{apart:.2g} from the scores in float64, where {allowed:.2g} is rounding"
    return {"format": name, "passed": apart <= allowed, "difference": apart, "reason": reason}


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


def peak_of_process() -> int:
    """The most memory that this program has held, in bytes.

    The kernel's own count of a program: `ru_maxrss` of a child begins with what its parent held when it was forked, so that next to a
    large parent nothing that the child does would show.
    """
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used * (1 if sys.platform == "darwin" else 1024)  # Linux counts in KiB, macOS in bytes


def _peak(checkpoint: Checkpoint, length: int) -> int | None:
    """Memory that the model takes beyond the libraries, at batch 1, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", _PEAK, str(checkpoint.path), str(length)], capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    before, after = map(int, done.stdout.split()[-2:])
    return after - before
