"""The demo: the whole life of a small model in five minutes, every claim shown and none taken on trust."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cairn.errors import CairnError, InputError

if TYPE_CHECKING:
    from cairn.evaluation.measure import ResultRow

RECIPE = "demo"
KILL_AT = 70
"""Step in whose neighbourhood the training process is killed: between two checkpoints."""
COMPARED_AT = 80
"""Step of the first checkpoint after the resume; a run that nobody kills is trained up to here beside it."""
AVERAGED = 3
PROMPT = "def read(path):\n"

Say = Callable[[str], object]


class ClaimFailed(CairnError):
    """What the demo says is not what it saw."""

    exit_status = 1


def demo(out: str | Path, say: Say = print) -> dict[str, Any]:
    """Train on this Python installation, kill the process, resume bit for bit, measure, average, open in transformers.

    Everything lands in the new directory `out`; returns what was shown. Raises `InputError` when `out` is not empty or
    transformers is missing, `ClaimFailed` when a claim does not hold.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; remove it or name another place with -o.")
    if importlib.util.find_spec("transformers") is None:
        raise InputError("The demo opens its model in transformers too: pip install 'cairn-lm[hf]'.")
    run, average, began = out / "run", out / "average", time.monotonic()
    say(f"1. Train a LLaMA from scratch on the text of this Python installation, and kill the process at step {KILL_AT}.")
    before = _train_and_kill(run)
    say(f"   SIGKILL after step {before[-1]['step']}. Left behind, complete: {', '.join(_names(run))}.")
    say("2. Resume, and train to the end.")
    repeated = _resume(run, before)
    say(f"   {repeated} steps were computed by both processes: the same {repeated} losses, to the last bit.")
    say(f"3. Train the same recipe once more up to step {COMPARED_AT}, and let nobody interrupt it.")
    digest = _compare(run, out / "uninterrupted", say)
    say("4. Measure every checkpoint on held-out text, average the last ones, measure the average.")
    rows = _measure(run, average, say)
    say("5. Open the average in transformers: the directory as it lies, no conversion.")
    gap = _open_in_transformers(average, say)
    say("6. Where the average comes from:")
    _lineage(average, say)
    picture = _draw(run, rows, before[-1]["tokens"], out / "demo.png")
    minutes = (time.monotonic() - began) / 60
    say(f"Done in {minutes:.1f} minutes; loss and held-out bits per byte are drawn in {picture}.")
    say(f"Go on: cairn generate {average} --prompt 'Return the '    cairn show {run}    cairn diff {run} {average}")
    return {
        "run": str(run),
        "average": str(average),
        "picture": str(picture),
        "killed_after_step": before[-1]["step"],
        "repeated_losses": repeated,
        "digest_with_and_without_kill": digest,
        "bits_per_byte": rows[-1].value,
        "logit_gap": gap,
        "minutes": minutes,
    }


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cairn", *arguments, "--json"]


def _train_and_kill(run: Path) -> list[dict[str, Any]]:
    """Train in a process of its own until step KILL_AT, then kill that; returns the rows that it had logged."""
    from cairn.training.run import Run

    with subprocess.Popen(_command("train", RECIPE, "--run", str(run)), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            rows = Run(run).metrics()
            if rows and rows[-1]["step"] >= KILL_AT:
                process.kill()
                process.wait()
                return Run(run).metrics()
            time.sleep(0.05)
    raise ClaimFailed(f"Training ended by itself before step {KILL_AT}; see what it said above.")


def _resume(run: Path, before: list[dict[str, Any]]) -> int:
    """Finish the run in another process; compare the losses that both computed. Returns how many there are."""
    from cairn.training.run import Run

    kept = Run(run).newest().step or 0
    if subprocess.run(_command("resume", str(run)), stdout=subprocess.DEVNULL).returncode:
        raise ClaimFailed("The run could not be resumed; see what it said above.")
    again = {row["step"]: row["loss"] for row in Run(run).metrics()}
    twice = [row for row in before if row["step"] > kept]
    different = [row["step"] for row in twice if again[row["step"]] != row["loss"]]
    if different or not twice:
        raise ClaimFailed(f"The resumed run does not repeat the killed one: {len(twice)} steps compared, {len(different)} differ.")
    return len(twice)


def _compare(run: Path, beside: Path, say: Say) -> str:
    """Train without interruption beside; weights, moments, position in the data: the checkpoints' digests must be equal."""
    from cairn.checkpoint.format import read
    from cairn.training.run import train

    resumed = read.open(run / "checkpoints" / f"step-{COMPARED_AT:08d}")
    whole = train(RECIPE, beside, stop_at_step=COMPARED_AT).newest()
    say(f"   killed and resumed   {resumed.path.name}  {resumed.digest}")
    say(f"   never interrupted    {whole.path.name}  {whole.digest}")
    if whole.digest != resumed.digest:
        raise ClaimFailed("The two digests differ: the resume was not exact.")
    return whole.digest


def _measure(run: Path, out: Path, say: Say) -> list[ResultRow]:
    """Measure all checkpoints and the average; returns the rows of bits per byte, the average's last."""
    from cairn.data import datasets
    from cairn.evaluation.measure import evaluate
    from cairn.merging.combine import average

    tasks: list[Any] = [{"name": "held-out", "sequences": 128}]
    if datasets.locate("blimp"):
        tasks.append({"name": "blimp", "pairs": 10})
    average([run], out, last=AVERAGED)
    rows = [*evaluate(run, tasks), *evaluate(out, tasks)]
    for row in rows:
        if (row.task, row.metric) in (("held-out", "bits_per_byte"), ("blimp", "accuracy")):
            chance = f" (chance {row.chance:g})" if row.chance is not None else ""
            say(f"   {row.checkpoint:<14}  {row.task} {row.metric.replace('_', ' ')} {row.value:.3f} +- {row.stderr:.3f}{chance}")
    return [row for row in rows if row.metric == "bits_per_byte"]


def _open_in_transformers(path: Path, say: Say) -> float:
    """Largest absolute difference between transformers' logits and ours; raises if it is more than rounding."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # 38 tensors; the line would tear ours

    from cairn.checkpoint.format import read

    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        gap = float((theirs(ids).logits - read.open(path).model()(ids).logits).abs().max())
        written = theirs.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0]
    say(f"   AutoModelForCausalLM: {type(theirs).__name__}; the largest difference between its logits and ours is {gap:.1e}.")
    say(f"   It writes {tokenizer.decode(written)!r}.")
    if not math.isfinite(gap) or gap > 1e-4:
        raise ClaimFailed(f"transformers computes other logits than ours: they differ by {gap}.")
    return gap


def _lineage(path: Path, say: Say) -> None:
    from cairn.checkpoint.format.summary import log

    for entry in log(path):
        say("   " + "  ".join([entry["digest"][:12], entry["act"], Path(entry["path"]).name, *entry["changed"]]))


def _draw(run: Path, rows: list[ResultRow], killed: int, picture: Path) -> Path:
    from cairn.evaluation.trajectory import draw_run
    from cairn.training.run import Run

    return draw_run(Run(run).metrics(), rows, picture, marks={"killed, resumed": killed})


def _names(run: Path) -> list[str]:
    from cairn.checkpoint.format import read

    return [path.name for path in read.list_checkpoints(run)]
