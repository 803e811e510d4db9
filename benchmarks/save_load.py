"""Saving and loading a 100M-parameter state with AdamW moments (1.2 GB), beside plain system calls and torch's own.

    python benchmarks/save_load.py [--rounds 5] [--folder DIR]

Every round runs all contestants in a rotating order on the same tensors; each save ends with its bytes flushed to disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import record
import torch

from cairn.checkpoint.format import read
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.saving import write

Tensors = dict[str, torch.Tensor]


def state(parameters: int) -> tuple[Tensors, Tensors]:
    """Weights and two moments, in tensors of about 4M items."""
    count = 4_000_000
    model = {f"layer.{i}.weight": torch.randn(2000, count // 2000) for i in range(parameters // count)}
    moments = {f"{name}/{key}": torch.randn_like(tensor) for name, tensor in model.items() for key in ("exp_avg", "exp_avg_sq")}
    return model, moments


def sync(path: Path) -> None:
    for file in [path] if path.is_file() else path.rglob("*"):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def save_ours(path: Path, model: Tensors, moments: Tensors) -> None:
    write.save(path, model=model, optimizer=moments, config={}, trainer={"step": 1, "tokens": 1}, lineage=Lineage.record("run", "train"))


def save_plain(path: Path, model: Tensors, moments: Tensors) -> None:
    fd, position = os.open(path, os.O_WRONLY | os.O_CREAT), 0
    for tensor in (model | moments).values():
        data = write.as_bytes(tensor)
        while len(data):
            count = os.pwrite(fd, data, position)
            position, data = position + count, data[count:]
    os.fsync(fd)
    os.close(fd)


def save_torch(path: Path, model: Tensors, moments: Tensors) -> None:
    torch.save({"model": model, "optimizer": moments}, path)
    sync(path)


def save_dcp(path: Path, model: Tensors, moments: Tensors) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": model, "optimizer": moments}, checkpoint_id=path, no_dist=True)
    sync(path)


def load_ours(path: Path, model: Tensors, moments: Tensors) -> None:
    checkpoint = read.open(path)
    checkpoint.tensors.load()
    assert checkpoint.optimizer is not None
    checkpoint.optimizer.load()


def load_plain(path: Path, model: Tensors, moments: Tensors) -> None:
    fd, position, kept = os.open(path, os.O_RDONLY), 0, []
    for tensor in (model | moments).values():
        kept.append(torch.empty_like(tensor))  # all of them stay, as they do for whoever loads a state
        target = memoryview(kept[-1].view(-1).view(torch.uint8).numpy())
        while len(target):
            count = os.preadv(fd, [target], position)
            position, target = position + count, target[count:]
    os.close(fd)


def load_torch(path: Path, model: Tensors, moments: Tensors) -> None:
    torch.load(path, weights_only=True)


def load_dcp(path: Path, model: Tensors, moments: Tensors) -> None:
    import torch.distributed.checkpoint as dcp

    into = {"model": {k: torch.empty_like(v) for k, v in model.items()}, "optimizer": {k: torch.empty_like(v) for k, v in moments.items()}}
    dcp.load(into, checkpoint_id=path, no_dist=True)


CONTESTANTS: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "cairn (digests included)": (save_ours, load_ours),
    "plain pwrite + fsync / read": (save_plain, load_plain),
    "torch.save / torch.load": (save_torch, load_torch),
    "torch.distributed.checkpoint": (save_dcp, load_dcp),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    model, moments = state(arguments.parameters)
    size = sum(t.nbytes for t in (model | moments).values())
    saves: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    loads: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        for number in range(arguments.rounds + 1):
            names = list(CONTESTANTS)
            names = names[number % len(names) :] + names[: number % len(names)]
            for name in names:
                save, load = CONTESTANTS[name]
                path = folder / "state"
                os.sync()
                began = time.perf_counter()
                save(path, model, moments)
                middle = time.perf_counter()
                load(path, model, moments)
                end = time.perf_counter()
                if number:  # the first round warms up
                    saves[name].append(middle - began)
                    loads[name].append(end - middle)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    plain = "plain pwrite + fsync / read"
    rows = [
        (
            name,
            statistics.median(saves[name]),
            record.median_ratio(saves[name], saves[plain]),
            statistics.median(loads[name]),
            record.median_ratio(loads[name], loads[plain]),
        )
        for name in CONTESTANTS
    ]
    record.write(
        "save_load",
        "Saving and loading a checkpoint",
        f"python benchmarks/save_load.py --rounds {arguments.rounds} --parameters {arguments.parameters}",
        ("", "save, s", "save / plain", "load, s", "load / plain"),
        rows,
        f"{arguments.parameters:,} parameters with two AdamW moments, {size / 1e9:.2f} GB in float32, {arguments.rounds} rounds in rotating order. "
        "Times are medians, ratios are medians of the rounds' own ratios. Saves end with the bytes flushed; loads read what lies in the page cache. "
        "Ours computes blake3 digests of all blocks while saving; loading does not check them (`cairn verify` does).",
        {"saves": saves, "loads": loads, "bytes": size},
    )


if __name__ == "__main__":
    main()
