"""The demo: the whole life of a small model in five minutes, every claim shown and none taken on trust."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cairn.errors import CairnError, InputError

RECIPE = "demo"
KILL_AT = 230
"""Step in whose neighbourhood the training process is killed: between two checkpoints."""
AVERAGED = 3


def demo(out: str | Path, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Train on this Python installation, kill the process, resume bit for bit, measure, average, open in transformers.

    Everything lands in the new directory `out`; returns what was shown. Raises `CairnError` if a claim does not hold.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; remove it or name another place with -o.")
    run = out / "run"
    began = time.monotonic()
    say(f"1. Train a LLaMA from scratch on the text of this Python installation (recipe '{RECIPE}'), and kill it with SIGKILL at step {KILL_AT}.")
    before = _train_and_kill(run)
    say(f"   Killed after step {before[-1]['step']}. Newest complete checkpoint: {_newest(run)}.")
    say("2. Resume. The steps after that checkpoint are computed a second time: every loss must be the same number.")
    resumed = _resume(run, before)
    say(f"   {resumed} losses compared, {resumed} bit-identical.")
    say("3. Measure every checkpoint on held-out text, average the last ones, measure the average.")
    rows = _measure(run, out / "average", say)
    say("4. Open the average in transformers: no conversion, the directory as it lies.")
    gap = _open_in_transformers(out / "average")
    say(f"   Largest difference between transformers' logits and ours: {gap:.1e}.")
    say("5. Where the average comes from:")
    _lineage(out / "average", say)
    picture = _draw(run, rows, out / "demo.png")
    minutes = (time.monotonic() - began) / 60
    say(f"Done in {minutes:.1f} minutes. The picture: {picture}")
    say(f"Go on: cairn generate {out / 'average'} --prompt 'Return the '   |   cairn show {run}   |   cairn log {out / 'average'}")
    return {"run": str(run), "average": str(out / "average"), "picture": str(picture), "identical_losses": resumed, "logit_gap": gap, "minutes": minutes}


def _train_and_kill(run: Path) -> list[dict[str, Any]]:
    """Train in a process of its own until step KILL_AT, then kill that; returns the rows it had logged."""
    from cairn.train.run import Run

    process = subprocess.Popen([sys.executable, "-m", "cairn", "train", RECIPE, "--run", str(run), "--json"], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        rows = Run(run).metrics()
        if rows and rows[-1]["step"] >= KILL_AT:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return Run(run).metrics()
        time.sleep(0.05)
    raise CairnError(f"Training ended by itself before step {KILL_AT}; see what it said above.")


def _resume(run: Path, before: list[dict[str, Any]]) -> int:
    """Finish the run in another process; compare the losses that both computed. Returns how many were the same."""
    from cairn.train.run import Run

    kept = Run(run).newest().step or 0
    subprocess.run([sys.executable, "-m", "cairn", "resume", str(run), "--json"], stdout=subprocess.DEVNULL, check=True)
    again = {row["step"]: row["loss"] for row in Run(run).metrics()}
    twice = [row for row in before if row["step"] > kept]
    different = [row["step"] for row in twice if again[row["step"]] != row["loss"]]
    if different or not twice:
        raise CairnError(f"The resumed run does not repeat the killed one: {len(twice)} steps compared, first difference at step {different[:1]}.")
    return len(twice)


def _measure(run: Path, out: Path, say: Callable[[str], object]) -> list[Any]:
    from cairn.data import datasets
    from cairn.evaluate.measure import evaluate
    from cairn.merge.combine import average

    tasks: list[Any] = [{"name": "held-out", "sequences": 128}]
    if datasets.locate("blimp"):
        tasks.append({"name": "blimp", "pairs": 20})
    rows = evaluate(run, tasks)
    average([run], out, last=AVERAGED)
    for row in [*rows, *evaluate(out, tasks)]:
        if row.metric in ("bits_per_byte", "accuracy"):
            say(f"   {row.checkpoint:<14} {row.task} {row.metric.replace('_', ' ')} {row.value:.4f} +- {row.stderr:.4f}")
    return rows


def _open_in_transformers(path: Path) -> float:
    """Largest absolute difference of logits on the model's own tokens; raises if it is not rounding."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cairn.checkpoint import read

    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    ids = tokenizer("def read(path): return the text of a file", return_tensors="pt").input_ids
    with torch.no_grad():
        gap = float((theirs(ids).logits - read.open(path).model()(ids).logits).abs().max())
    if not math.isfinite(gap) or gap > 1e-4:
        raise CairnError(f"transformers computes other logits than ours: they differ by {gap}.")
    return gap


def _lineage(path: Path, say: Callable[[str], object]) -> None:
    from cairn.checkpoint.summary import log

    for entry in log(path):
        say(
            f"   {'  ' * entry['generation']}{entry['digest'][:12]} {entry['act']} {Path(entry['path']).name}"
            + "".join(f"; {line}" for line in entry["changed"])
        )


def _draw(run: Path, rows: list[Any], picture: Path) -> Path:
    from cairn.evaluate.trajectory import draw_run
    from cairn.train.run import Run

    metrics = Run(run).metrics()
    killed = next(row["tokens"] for row in metrics if row["step"] == KILL_AT)
    return draw_run(metrics, rows, picture, marks={"killed, resumed": killed})


def _newest(run: Path) -> str:
    from cairn.checkpoint import read

    return read.list_checkpoints(run)[-1].name
