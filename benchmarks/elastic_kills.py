"""Workers killed at random moments under torchrun: does the run end by itself, with the weights of one that lost nothing?

python benchmarks/elastic_kills.py [--kills 30] [--processes 2]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record
import yaml

from cairn.training.run import Run

RECIPE = {
    "seed": 1,
    "model": {"name": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4},
    "data": {"tokenizer": "byte", "sources": {"source": {"corpus": {"name": "python-source", "max_bytes": "1 MiB"}}}, "sequence_length": 64},
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "schedule": {"name": "cosine", "warmup": "10 steps"},
    "training": {"batch": 1024, "compile": False},
    "checkpoint": {"every": "1 steps", "keep": 3},
}
STEPS_PER_KILL = 12


def workers(launcher: int) -> list[int]:
    """The processes that the launcher has started and that still run."""
    found = []
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        try:
            running = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            continue
        if running:
            found.append(int(child))
    return found


def launch(recipe: Path, run: Path, processes: int, restarts: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    command += ["-m", "cairn", "train", str(recipe), "--run-directory", str(run), "--json"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def last_step(run: Path) -> int:
    rows = Run(run).metrics()
    return rows[-1]["step"] if rows else 0


def kill_one(process: subprocess.Popen[bytes], run: Path, chooser: random.Random, after: int) -> dict[str, int]:
    """SIGKILL one worker at a random moment once `after` steps are made; returns where that was."""
    while last_step(run) < after:
        if process.poll() is not None:
            raise RuntimeError(f"torchrun ended with status {process.returncode} at step {last_step(run)}")
        time.sleep(0.02)
    time.sleep(chooser.uniform(0, 0.3))
    victim = chooser.choice(workers(process.pid))
    saving = any((run / "checkpoints").glob(".writing-*"))
    step = last_step(run)
    os.kill(victim, signal.SIGKILL)
    while victim in workers(process.pid):
        time.sleep(0.02)
    return {"step": step, "during_a_save": int(saving)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    chooser, kills = random.Random(3), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        values = {**RECIPE, "parallel": {"data": arguments.processes}}
        values["training"] = {**RECIPE["training"], "tokens": f"{STEPS_PER_KILL * (arguments.kills + 1)} steps"}  # type: ignore[dict-item]
        (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
        whole = launch(folder / "recipe.yaml", folder / "whole", arguments.processes, 0).wait()
        process = launch(folder / "recipe.yaml", folder / "lossy", arguments.processes, arguments.kills + 10)
        for number in range(arguments.kills):
            kills.append(kill_one(process, folder / "lossy", chooser, STEPS_PER_KILL * (number + 1) - 8))
            print(kills[-1], file=sys.stderr, flush=True)
        lossy = process.wait()
        a, b = Run(folder / "whole").newest(), Run(folder / "lossy").newest()
        rows = [
            ("workers killed", len(kills)),
            ("... of these while a checkpoint was being written", sum(kill["during_a_save"] for kill in kills)),
            ("torchrun's exit status", f"{whole} without kills, {lossy} with"),
            ("final weights, moments and cursor bit-equal", "yes" if a.digest == b.digest else "NO"),
        ]
        record.write(
            "elastic_kills",
            "Workers lost at random",
            f"python benchmarks/elastic_kills.py --kills {arguments.kills} --processes {arguments.processes}",
            ("", "found"),
            rows,
            f"A small LLaMA trains in {arguments.processes} processes under `torchrun --max-restarts` and saves every step. Again and again one "
            "worker is killed with SIGKILL at a random moment; torchrun starts all of them again and they go on from the newest complete checkpoint.",
            {"kills": kills, "digests": [a.digest, b.digest]},
        )


if __name__ == "__main__":
    main()
