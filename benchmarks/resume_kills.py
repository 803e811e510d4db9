"""Kills at random moments: does a resumed run equal the uninterrupted one, and is the newest checkpoint always whole?

    python benchmarks/resume_kills.py [--kills 20]

Each trial copies a run that has made some steps, goes on with it in a process that saves at every step, kills that with
SIGKILL at a random moment (during an update, during a save), verifies what is visible, resumes, and compares the 50
steps after the kill, the final weights and the final digest with the uninterrupted run.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record

from cairn.checkpoint.format import read, verify
from cairn.training.run import Run, train

STEPS = 110
RECIPE = {
    "seed": 1,
    "model": {"name": "llama", "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4},
    "data": {"tokenizer": "byte", "sources": {"source": {"corpus": {"name": "python-source", "max_bytes": "2 MiB"}}}, "sequence_length": 64},
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "schedule": {"name": "cosine", "warmup": "10 steps"},
    "training": {"tokens": f"{STEPS} steps", "batch": 1024, "compile": False},
    "checkpoint": {"every": "1 steps", "keep": 3},
}


def trial(number: int, start: Path, folder: Path, whole: Run, chooser: random.Random) -> dict[str, object]:
    """One kill and what came of it."""
    run = folder / f"trial-{number}"
    shutil.copytree(start, run)
    first, delay = chooser.randint(6, 40), chooser.uniform(0, 0.25)
    process = subprocess.Popen([sys.executable, "-m", "cairn", "resume", str(run), "--json"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not Run(run).metrics() or Run(run).metrics()[-1]["step"] < first):
        time.sleep(0.005)
    time.sleep(delay)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    saving = any((run / "checkpoints").glob(".writing-*"))
    visible = read.list_checkpoints(run)
    sound = all(verify.verify(path).sound for path in visible)
    at = read.open(run).step or 0
    resumed = subprocess.run([sys.executable, "-m", "cairn", "resume", str(run), "--json"], capture_output=True, text=True)
    assert resumed.returncode == 0, f"the resumed process left with {resumed.returncode}: {resumed.stderr[-4000:]}"
    losses = {row["step"]: row["loss"] for row in Run(run).metrics()}
    expected = {row["step"]: row["loss"] for row in whole.metrics()}
    after = [losses[step] == expected[step] for step in range(at + 1, at + 51)]
    same = Run(run).newest().digest == whole.newest().digest
    shutil.rmtree(run)
    return {"killed": alive, "newest_step": at, "during_a_save": saving, "sound": sound, "steps_equal": sum(after), "digest_equal": same}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    arguments = parser.parse_args()
    folder, chooser = Path(tempfile.mkdtemp()), random.Random(5)
    try:
        whole = train(RECIPE, folder / "whole")
        train(RECIPE, folder / "start", stop_at_step=5)
        trials = []
        for number in range(arguments.kills):
            trials.append(trial(number, folder / "start", folder, whole, chooser))
            print(trials[-1], file=sys.stderr)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    counted = [t for t in trials if t["killed"]]
    rows = [
        ("processes killed while they worked", f"{len(counted)} of {len(trials)}"),
        ("... of these in the middle of a save", sum(bool(t["during_a_save"]) for t in counted)),
        ("newest visible checkpoints sound", f"{sum(bool(t['sound']) for t in counted)} of {len(counted)}"),
        ("50 steps after the resume bit-equal", f"{sum(t['steps_equal'] == 50 for t in counted)} of {len(counted)}"),
        ("final digest equal (weights, moments, cursor)", f"{sum(bool(t['digest_equal']) for t in counted)} of {len(counted)}"),
    ]
    record.write(
        "resume_kills",
        "Kills at random moments",
        f"python benchmarks/resume_kills.py --kills {arguments.kills}",
        ("", "count"),
        rows,
        "A LLaMA of 0.9M parameters trains with a checkpoint at every step and is killed with SIGKILL at a random moment, then resumed.",
        {"trials": trials},
    )


if __name__ == "__main__":
    main()
