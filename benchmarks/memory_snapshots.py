"""What snapshots in memory cost and what they save, beside checkpoints on disk and beside torch's own save in a process.

Overhead: a LLaMA of 20M parameters whose step is padded to 200 ms trains with a snapshot every 2 steps and without, in turns.
Recovery: the same run is killed with SIGKILL in an update and resumed by the command line; from the kill to the next finished
step, from memory and from disk, in turns. In flight: a trainer is killed right after it has handed a state over; what can be
read back afterwards. The deaths themselves, thirty kills and ten nodes, are those of `cairn study memory-snapshots`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record

from cairn.checkpoint.format import read
from cairn.checkpoint.memory.plan import find
from cairn.studies.nodes import Fault, NodeJob
from cairn.training.run import Run

MEMORY = ["fault_tolerance.memory.every=2"]


def recipe(width: int, steps: int) -> dict[str, Any]:
    """20M parameters at a width of 512."""
    return {
        "model": {"name": "llama", "hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": 6, "num_attention_heads": 8},
        "data": {"tokenizer": "byte", "sources": {"source": {"corpus": {"name": "python-source", "max_bytes": "2 MiB"}}}, "sequence_length": 32},
        "training": {"tokens": f"{steps} steps", "batch": 64, "compile": False},
        "checkpoint": {"every": "1000000 steps"},
    }


def pad_to_200_ms() -> None:
    """In the trainer: computing the gradient takes 200 ms. What waits for a snapshot, before the update or after it, comes on top."""
    from cairn.training.loop import Trainer

    gradients = Trainer.gradients

    def padded(self: Trainer, micro_batches: Any) -> Any:
        began = time.perf_counter()
        figures = gradients(self, micro_batches)
        time.sleep(max(0.0, 0.2 - (time.perf_counter() - began)))
        return figures

    Trainer.gradients = padded  # type: ignore[method-assign]


def seconds_per_step(folder: Path, steps: int, width: int, settings: list[str]) -> float:
    """Of a whole run, from its metrics: begin and end, saves and waiting included."""
    with NodeJob(folder, 1, settings, prepare="memory_snapshots:pad_to_200_ms") as job:
        job.start(recipe(width, steps))
        if not job.finish(within=3600):
            raise RuntimeError(f"the run did not end well; see {folder}-trainer-0.log")
        rows = Run(folder).metrics()
    shutil.rmtree(folder)
    first = 5  # the first steps fill caches and lay memory out
    return (rows[-1]["seconds"] - rows[first]["seconds"]) / (len(rows) - 1 - first)


def recovery(folder: Path, width: int, at: int, settings: list[str]) -> dict[str, float]:
    """Seconds from a kill in the update after step `at` to the next finished step, resumed by the command line, and the steps that were lost."""
    with NodeJob(folder, 1, settings) as job:
        job.start(recipe(width, 1000), Fault(0, "update", at + 1))
        job.finish(within=3600)
        if job.ended != [-signal.SIGKILL]:
            raise RuntimeError(f"the trainer was not killed as planned; see {folder}-trainer-0.log")
        plan = find(folder)
        from_step = max(plan.version.step if plan is not None else 0, read.open(folder).step or 0)
        before = {row["step"]: row for row in Run(folder).metrics()}
        place = os.environ | {"CAIRN_NODE": "node-0", "CAIRN_MEMORY": str(job.memory(0))}
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "cairn", "resume", str(folder)], env=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            first_step = caught_up = 0.0
            while process.poll() is None and not caught_up:
                rows = {row["step"]: row for row in Run(folder).metrics()}
                since = time.perf_counter() - began
                # The row of a step that is made again replaces the one from before the death.
                if not first_step and rows.get(from_step + 1, before.get(from_step + 1)) != before.get(from_step + 1):
                    first_step = since
                caught_up = since if at + 1 in rows else 0.0
                time.sleep(0.005)
        finally:
            process.kill()
            process.wait()
    shutil.rmtree(folder)
    return {"first_step": first_step or caught_up, "caught_up": caught_up, "lost": at - from_step}


TORCH = """
import os, sys, torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
if __name__ == "__main__":
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2], "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo")
    state = {f"w{i}": torch.ones(4 * 2**20) for i in range(15)}
    dcp.async_save(state, checkpoint_id=sys.argv[1], async_checkpointer_type=AsyncCheckpointerType.PROCESS)
    os.kill(os.getpid(), 9)
"""


def torch_in_flight(folder: Path) -> bool:
    """Whether a state of 240 MB that was handed to torch's saving process is there after the trainer was killed."""
    folder.mkdir()
    (folder / "trainer.py").write_text(TORCH)
    subprocess.run([sys.executable, str(folder / "trainer.py"), str(folder / "state"), str(29500 + os.getpid() % 2000)], capture_output=True, timeout=300)
    time.sleep(20)  # what an orphan may need to finish
    return (folder / "state" / ".metadata").exists()


def die_in_flight() -> None:
    """In the trainer: death right after the snapshot of step 4 was handed over."""
    from cairn.checkpoint.memory.snapshots import Snapshots

    commit = Snapshots.commit

    def commit_and_die(self: Snapshots) -> None:
        commit(self)
        if self._last is not None and self._last.step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    Snapshots.commit = commit_and_die  # type: ignore[method-assign]


def ours_in_flight(folder: Path, width: int) -> bool:
    """The same with a keeper."""
    with NodeJob(folder, 1, MEMORY, prepare="memory_snapshots:die_in_flight") as job:
        job.start(recipe(width, 100))
        job.finish(within=3600)
        time.sleep(1)
        plan = find(folder)
        return plan is not None and plan.version.step == 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--width", type=int, default=512, help="512: 20M parameters")
    arguments = parser.parse_args()
    folder, width = Path(tempfile.mkdtemp()), arguments.width
    os.environ["CAIRN_NODE"] = "node-0"  # where the trainers are, whose keepers are asked here
    os.environ["PYTHONPATH"] = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    raw: dict[str, Any] = {"without": [], "every_2": [], "from_memory": [], "from_disk": [], "torch_process_kept": [], "ours_kept": []}
    try:
        for number in range(arguments.rounds):
            raw["without"].append(seconds_per_step(folder / f"a{number}", arguments.steps, width, []))
            raw["every_2"].append(seconds_per_step(folder / f"b{number}", arguments.steps, width, MEMORY))
            raw["from_memory"].append(recovery(folder / f"c{number}", width, 45, MEMORY))
            raw["from_disk"].append(recovery(folder / f"d{number}", width, 45, ["checkpoint.every=40 steps"]))
            raw["torch_process_kept"].append(torch_in_flight(folder / f"e{number}"))
            raw["ours_kept"].append(ours_in_flight(folder / f"f{number}", width))
            print({key: values[-1] for key, values in raw.items()}, file=sys.stderr)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    def middle(key: str, part: str) -> float:
        return statistics.median(each[part] for each in raw[key])

    rows = [
        ("a step of 200 ms without snapshots, ms", 1000 * statistics.median(raw["without"])),
        ("with one every 2 steps, ms", 1000 * statistics.median(raw["every_2"])),
        ("overhead", f"{record.median_ratio(raw['every_2'], raw['without']) - 1:.1%}"),
        ("kill to the next finished step, from memory, s", middle("from_memory", "first_step")),
        ("kill until all lost steps are made again, from memory, s", middle("from_memory", "caught_up")),
        ("kill to the next finished step, disk every 40 steps, s", middle("from_disk", "first_step")),
        ("kill until all lost steps are made again, disk every 40 steps, s", middle("from_disk", "caught_up")),
        ("states in flight at a SIGKILL that were kept: torch's saving process", f"{sum(raw['torch_process_kept'])} of {arguments.rounds}"),
        ("states in flight at a SIGKILL that were kept: keeper", f"{sum(raw['ours_kept'])} of {arguments.rounds}"),
    ]
    record.write(
        "memory_snapshots",
        "Snapshots in memory",
        f"python benchmarks/memory_snapshots.py --rounds {arguments.rounds} --steps {arguments.steps} --width {width}",
        ("", "median"),
        rows,
        "A LLaMA of 20M parameters (240 MB of state): a snapshot every 2 steps, recovery from a kill, and a state in flight when its trainer dies.",
        raw,
    )


if __name__ == "__main__":
    main()
