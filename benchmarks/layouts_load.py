"""Loading a checkpoint in another layout than it was saved in: time, bytes and memory of each rank.

    python benchmarks/layouts_load.py [--ranks 4] [--rounds 5] [--parameters 100000000] [--folder DIR]

One process saves weights and two moments; then each rank of several loads its rows, or its columns, of every tensor into memory
that it has, beside a plain reading of as many bytes into as much memory. Bytes are those of read calls plus those copied
through a mapping of the file. Memory is private memory (RssAnon), sampled every millisecond: pages of the file that the system
keeps for all processes are not the rank's own.
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
import threading
import time
from pathlib import Path
from typing import Any

import record
import torch
import torch.distributed as dist

from cairn.checkpoint.format import lazy, read
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.parts import Part
from cairn.checkpoint.saving import write

LAYOUTS = {"rows": 0, "columns": 1}


def private_memory() -> int:
    """Bytes of anonymous memory of this process."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


class Peak:
    """The largest private memory while it is entered."""

    def __enter__(self) -> Peak:
        self.bytes, self._over = private_memory(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.001):
            self.bytes = max(self.bytes, private_memory())

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()


class Counted:
    """The bytes that our reader takes from files."""

    def __init__(self) -> None:
        self.bytes = 0
        into, view, rows = lazy.MappedFile.read_into, lazy.LazyTensor.view, lazy.LazyTensor._copy_rows

        def read_into(file: lazy.MappedFile, target: memoryview, position: int) -> None:
            self.bytes += len(target)
            into(file, target, position)

        def copy_rows(tensor: lazy.LazyTensor, part: Part, out: torch.Tensor) -> bool:
            seen, lazy.LazyTensor.view = lazy.LazyTensor.view, view  # type: ignore[method-assign]
            copied = rows(tensor, part, out)
            lazy.LazyTensor.view = seen  # type: ignore[method-assign]
            self.bytes += out.nbytes if copied else 0  # it reads what it writes
            return copied

        counted = self

        class Seen:
            """A mapped tensor of which parts are copied."""

            def __init__(self, tensor: torch.Tensor) -> None:
                self.tensor = tensor

            def __getitem__(self, index: Any) -> torch.Tensor:
                counted.bytes += self.tensor[index].nbytes
                return self.tensor[index]

        lazy.LazyTensor._copy_rows = copy_rows  # type: ignore[method-assign]
        lazy.MappedFile.read_into = read_into  # type: ignore[method-assign]
        lazy.LazyTensor.view = lambda tensor: Seen(view(tensor))  # type: ignore[method-assign,assignment,return-value]


def plain(files: list[Path], targets: list[torch.Tensor]) -> None:
    """Read as many bytes as `targets` hold, from this rank's stretch of the files."""
    fds = [os.open(file, os.O_RDONLY) for file in files]
    sizes = [file.stat().st_size for file in files]
    position = sum(target.nbytes for target in targets) * dist.get_rank()
    for target in targets:
        data = memoryview(target.reshape(-1).view(torch.uint8).numpy())
        while len(data):
            place, number = position % sum(sizes), 0
            while place >= sizes[number]:
                place, number = place - sizes[number], number + 1
            count = os.preadv(fds[number], [data[: sizes[number] - place]], place)
            position, data = position + count, data[count:]
    for fd in fds:
        os.close(fd)


def parts_of(tensors: dict[str, lazy.LazyTensor], axis: int) -> dict[str, Part]:
    rank, size = dist.get_rank(), dist.get_world_size()
    found = {}
    for name, tensor in tensors.items():
        shape, offset = list(tensor.shape), [0, 0]
        shape[axis] //= size
        offset[axis] = rank * shape[axis]
        found[name] = Part(name, tuple(offset), tuple(shape))
    return found


def worker(folder: Path, rounds: int) -> None:
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for layout, axis in LAYOUTS.items():
        opened = read.open(folder / "saved")
        assert opened.optimizer is not None
        tensors = dict(opened.tensors) | dict(opened.optimizer)
        parts, before = parts_of(tensors, axis), private_memory()
        targets = {name: torch.zeros(part.shape) for name, part in parts.items()}
        needed = sum(target.nbytes for target in targets.values())
        files = sorted((folder / "saved").glob("*.safetensors"))
        times: dict[str, list[float]] = {"ours": [], "plain": []}
        for number in range(rounds + 1):
            for name in ("ours", "plain")[:: 1 if number % 2 else -1]:
                dist.barrier()
                began = time.perf_counter()
                if name == "plain":
                    plain(files, list(targets.values()))
                else:
                    fresh = read.open(folder / "saved")
                    assert fresh.optimizer is not None
                    for key, tensor in (dict(fresh.tensors) | dict(fresh.optimizer)).items():
                        tensor.read_part(parts[key], targets[key])
                dist.barrier()
                if number:
                    times[name].append(time.perf_counter() - began)
        with Peak() as peak:
            fresh = read.open(folder / "saved")
            assert fresh.optimizer is not None
            for key, tensor in (dict(fresh.tensors) | dict(fresh.optimizer)).items():
                tensor.read_part(parts[key], targets[key])
        found[layout] = {"times": times, "needed": needed, "memory": peak.bytes - before}
        del targets
    counted = Counted()
    for layout, axis in LAYOUTS.items():
        counted.bytes = 0
        opened = read.open(folder / "saved")
        assert opened.optimizer is not None
        tensors = dict(opened.tensors) | dict(opened.optimizer)
        for key, part in parts_of(tensors, axis).items():
            tensors[key].read_part(part)
        found[layout]["read"] = counted.bytes
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(everyone))
    dist.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--worker", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        worker(arguments.worker, arguments.rounds)
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        shapes = {f"layer.{i}.weight": (2000, 2000) for i in range(arguments.parameters // 4_000_000)}
        model = {name: torch.randn(shape) for name, shape in shapes.items()}
        moments = {f"{name}/{key}": torch.randn(shape) for name, shape in shapes.items() for key in ("exp_avg", "exp_avg_sq")}
        write.save(folder / "saved", model=model, optimizer=moments, config={}, lineage=Lineage(kind="run", name="train"))
        del model, moments
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.ranks), __file__]
        subprocess.run([*launch, "--worker", str(folder), "--rounds", str(arguments.rounds)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        everyone = json.loads((folder / "found.json").read_text())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = []
    for layout in LAYOUTS:
        first = everyone[0][layout]
        ours, theirs = first["times"]["ours"], first["times"]["plain"]
        read_most = max(each[layout]["read"] / each[layout]["needed"] for each in everyone)
        beyond = max(each[layout]["memory"] - each[layout]["needed"] for each in everyone) / 1e6
        rows.append((layout, statistics.median(ours), statistics.median(theirs), record.median_ratio(ours, theirs), read_most, beyond))
    size = arguments.parameters // 4_000_000 * 3 * 16_000_000
    record.write(
        "layouts_load",
        "Loading in another layout",
        f"python benchmarks/layouts_load.py --ranks {arguments.ranks} --rounds {arguments.rounds} --parameters {arguments.parameters}",
        (f"each of {arguments.ranks} ranks reads its", "ours, s", "plain, s", "ours / plain", "bytes read / needed", "private memory beyond the state, MB"),
        rows,
        f"A checkpoint of {size / 1e9:.2f} GB (weights and two moments in float32, matrices of 2000 x 2000) that one process wrote; {arguments.rounds} rounds, "
        "from the page cache, times of the slowest rank. "
        "Plain reads as many bytes in one stretch. Bytes are those of read calls and those copied through a "
        "mapping; memory is private memory (RssAnon) at its peak, less what was there before. The largest of all ranks is shown.",
        {"ranks": everyone},
    )


if __name__ == "__main__":
    main()
