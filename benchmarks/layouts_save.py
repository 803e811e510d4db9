"""Several ranks save one state of 1.2 GB: how long until it lies there as transformers opens it, flushed to the disk.

    python benchmarks/layouts_save.py [--ranks 2 4] [--rounds 5] [--layers 12] [--folder DIR]

Every rank holds its rows of every weight and of two moments (FSDP's layout). In each round all contestants save the same
tensors, in a rotating order: ours, torch's HuggingFaceStorageWriter with consolidation, and every rank writing its bytes
with plain pwrite and fsync. What each of the first two leaves is opened with transformers in the round that warms up.
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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
import torch.distributed as dist

OURS, THEIRS, PLAIN = "cairn (digests included)", "HuggingFaceStorageWriter, consolidated", "plain pwrite + fsync of the same bytes"
State = dict[str, Any]


def configuration(layers: int) -> Any:
    """About 100M parameters at twelve layers; every dimension divides by four."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=12, tie_word_embeddings=True, dtype="float32"
    )


def state(config: Any) -> tuple[State, State]:
    """Weights and two moments, each rank with its rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).named_parameters()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def rows(shape: torch.Size) -> Any:
        return DTensor.from_local(torch.randn(shape[0] // dist.get_world_size(), *shape[1:]), mesh, [Shard(0)])

    model = {name: rows(shape) for name, shape in shapes.items()}
    return model, {f"{name}/{key}": rows(shape) for name, shape in shapes.items() for key in ("exp_avg", "exp_avg_sq")}


def flush(folder: Path) -> None:
    for file in folder.rglob("*"):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def save_ours(path: Path, config: Any, model: State, moments: State, peers: Any) -> None:
    from cairn.checkpoint.format.lineage import Lineage
    from cairn.checkpoint.saving import write

    origin = Lineage(kind="run", name="train")
    write.save(path, model=model, optimizer=moments, config=config.to_dict(), trainer={"step": 1, "tokens": 1}, lineage=origin, peers=peers)


def save_theirs(path: Path, config: Any, model: State, moments: State, peers: Any) -> None:
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(path), save_distributed=True, enable_consolidation=True, thread_count_consolidation=os.cpu_count() or 1)
    dcp.save(model | moments, storage_writer=writer, process_group=peers)
    if dist.get_rank() == 0:
        config.save_pretrained(path)
        flush(path)  # consolidation leaves its output to the system
    dist.barrier()


def save_plain(path: Path, config: Any, model: State, moments: State, peers: Any) -> None:
    from cairn.checkpoint.saving.write import as_bytes

    parts = [as_bytes(tensor.to_local()) for tensor in (model | moments).values()]
    share = sum(map(len, parts))
    if dist.get_rank() == 0:
        path.mkdir()
        with (path / "state").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, share * dist.get_world_size())
    dist.barrier()
    fd, position = os.open(path / "state", os.O_WRONLY), share * dist.get_rank()
    for data in parts:
        while len(data):
            count = os.pwrite(fd, data, position)
            position, data = position + count, data[count:]
    os.fsync(fd)
    os.close(fd)
    dist.barrier()


CONTESTANTS: dict[str, Callable[..., None]] = {OURS: save_ours, THEIRS: save_theirs, PLAIN: save_plain}


def opens(path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    AutoModelForCausalLM.from_pretrained(path)


def worker(folder: Path, rounds: int, layers: int) -> None:
    """One rank: saves in every round; the first notes the times in `folder`/times.json."""
    from cairn.checkpoint.saving.peers import Group

    dist.init_process_group("gloo")
    peers = Group(dist.group.WORLD)
    config = configuration(layers)
    model, moments = state(config)
    times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for number in range(rounds + 1):
        names = list(CONTESTANTS)
        names = names[number % len(names) :] + names[: number % len(names)]
        for name in names:
            path = folder / "saved"
            if peers.first:
                os.sync()
            dist.barrier()
            began = time.perf_counter()
            CONTESTANTS[name](path, config, model, moments, peers if name == OURS else None)
            dist.barrier()
            taken = time.perf_counter() - began
            if number:
                times[name].append(taken)
            elif peers.first and name != PLAIN:
                opens(path)
            if peers.first:
                shutil.rmtree(path)
            dist.barrier()
    if peers.first:
        size = sum(tensor.numel() * tensor.element_size() for tensor in (model | moments).values())
        (folder / "times.json").write_text(json.dumps({"bytes": size, "times": times}))
    dist.barrier()
    os._exit(0)


def measured(ranks: int, rounds: int, layers: int, place: Path | None) -> dict[str, Any]:
    """The times of one number of ranks."""
    folder = Path(tempfile.mkdtemp(dir=place))
    try:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__]
        arguments = ["--worker", str(folder), "--rounds", str(rounds), "--layers", str(layers)]
        subprocess.run([*launch, *arguments], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return json.loads((folder / "times.json").read_text())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--worker", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        worker(arguments.worker, arguments.rounds, arguments.layers)
    raw = {str(ranks): measured(ranks, arguments.rounds, arguments.layers, arguments.folder) for ranks in arguments.ranks}
    rows = [
        (ranks, name, statistics.median(times), record.median_ratio(times, found["times"][PLAIN]), record.median_ratio(times, found["times"][THEIRS]))
        for ranks, found in raw.items()
        for name, times in found["times"].items()
    ]
    size = next(iter(raw.values()))["bytes"]
    record.write(
        "layouts_save",
        "Several ranks saving one checkpoint",
        f"python benchmarks/layouts_save.py --ranks {' '.join(map(str, arguments.ranks))} --rounds {arguments.rounds} --layers {arguments.layers}",
        ("ranks", "", "seconds", "/ plain", "/ HuggingFaceStorageWriter"),
        rows,
        f"{size / 1e9:.2f} GB of float32 (weights and two AdamW moments), each rank with its rows of every tensor, gloo, {arguments.rounds} rounds in rotating "
        "order. From the call to a directory that transformers opens, bytes flushed. Times are medians, ratios are medians of the rounds' own ratios.",
        raw,
    )


if __name__ == "__main__":
    main()
