"""Signals at random moments: is a resumed run the uninterrupted one, bit for bit, with nothing lost, doubled or left behind?

    python benchmarks/resume_kills.py [--signals 200] [--folder DIR]

A small run saves at every step. It is started again and again, and each time a signal hits it at a random moment: while it starts, while it
computes, while it writes. After each signal its newest checkpoint is verified and its rows are counted; once it has come to its end, weights,
moments, cursor and every row are compared with those of a run that nobody touched. With `--folder`, what is done is kept, and a second call goes on.
Processes are forked from one that has loaded torch, so that a signal costs a second or two; those of a launcher are started as users start them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import record
import torch
import yaml

from cairn.checkpoint.format import read, verify
from cairn.cli import main as command_line
from cairn.training import execution, stage_runs  # noqa: F401 - loaded here, so that the processes that are forked need not
from cairn.training.directory import OWNER
from cairn.training.run import Run

STEPS, EACH = 400, 10
"""Steps of a run, and signals that hit it on the way."""
PATIENCE = 60.0
"""Seconds after which a process that was asked to end counts as hanging."""
RECIPE: dict[str, Any] = {
    "seed": 1,
    "model": {"name": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "data": {"tokenizer": "byte", "sources": {"source": {"corpus": {"name": "python-source", "max_bytes": "2 MiB"}}}, "sequence_length": 32, "held_out": 0.1},
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "schedule": {"name": "cosine", "warmup": "10 steps"},
    "training": {"tokens": f"{STEPS} steps", "batch": 512, "compile": False},
    "checkpoint": {"every": "1 steps", "keep": 3},
    "callbacks": [{"name": "evaluate", "every": "16 steps", "measurements": [{"name": "held-out", "sequences": 4}]}],
}
REQUEST = {"INT": [signal.SIGINT], "TERM": [signal.SIGTERM]}
"""Signals that ask: the process saves and leaves with status 130."""
FORCE = {"KILL": [signal.SIGKILL], "INT twice": [signal.SIGINT, signal.SIGINT], "STOP, then KILL": [signal.SIGSTOP, signal.SIGKILL]}
MOMENTS = ("start", "steps", "write")
KINDS = [
    *((name, moment, "process") for name in (*REQUEST, *FORCE) for moment in MOMENTS),
    *((name, moment, "group") for name in ("INT", "KILL") for moment in ("steps", "write")),
    ("KILL", "steps", "second trainer"),
    ("TERM", "write", "second trainer"),
]
LAUNCHED = [
    ("TERM", "steps", "launcher"),
    ("INT", "steps", "launched group"),
    ("KILL", "write", "launched group"),
    ("KILL", "steps", "worker"),
    ("TERM", "start", "launcher"),
]
"""Of a run in two processes."""


class Process:
    """A process of the command line, forked or started, that is the first of its group."""

    def __init__(self, arguments: list[str], log: Path, *, forked: bool) -> None:
        self.log = log
        with log.open("wb") as file:
            if forked:
                self.pid = os.fork()
                if not self.pid:
                    _become(arguments, file.fileno())
            else:
                started = subprocess.Popen([sys.executable, "-m", "cairn", *arguments], stdout=file, stderr=file, start_new_session=True)
                self.pid = started.pid
        self.status: int | None = None

    def running(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is None

    def wait(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while self.running() and time.monotonic() < end:
            time.sleep(0.005)
        return not self.running()

    def send(self, number: int, *, group: bool = False) -> None:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def _become(arguments: list[str], output: int) -> None:
    """Be a process of the command line from here on."""
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = 1
    try:
        sys.argv = ["cairn", *arguments]
        command_line.main()
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def rows(run: Path) -> list[dict[str, Any]]:
    return Run(run).metrics()


def workers(launcher: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(child) for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]
    return []


def reach(process: Process, run: Path, moment: str, chooser: random.Random, slow: bool) -> None:
    """Wait for the moment at which the signal is to hit."""
    if moment == "start":
        time.sleep(chooser.uniform(0, 6.0 if slow else 0.8))
        return
    before, wanted = len(rows(run)), chooser.randint(1, 8)
    while process.running() and len(rows(run)) < before + wanted:
        time.sleep(0.002)
    if moment == "write":
        late = len(rows(run)) + 12  # where this process comes too late to see a write, the signal hits it or the step after it
        while process.running() and not any((run / "checkpoints").glob(".writing-*")):
            if len(rows(run)) > late:
                break
        time.sleep(chooser.uniform(0, 0.004))
    else:
        time.sleep(chooser.uniform(0, 0.03))


def hit(process: Process, name: str, target: str, chooser: random.Random) -> bool:
    """Send the signals; whether the process was still there."""
    alive = process.running()
    for number, each in enumerate({**REQUEST, **FORCE}[name]):
        if number:
            time.sleep(chooser.uniform(0, 0.05))
        if target == "worker":
            for victim in workers(process.pid)[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, each)
        else:
            process.send(each, group="group" in target)
    return alive


def trial(run: Path, recipe: Path, kind: tuple[str, str, str], chooser: random.Random, log: Path) -> dict[str, Any]:
    """One signal and what came of it."""
    name, moment, target = kind
    slow = target in ("launcher", "launched group", "worker")
    begun = read.list_checkpoints(run) if run.exists() else []
    arguments = ["resume", str(run)] if begun else ["train", str(recipe), "--run", str(run), "--continue"]
    process = Process([*arguments, "--json"], log, forked=not slow)
    found: dict[str, Any] = {"signal": name, "moment": moment, "target": target, "faults": []}
    fault = found["faults"].append
    reach(process, run, moment, chooser, slow)
    if target == "second trainer" and process.running():
        second = Process(["resume", str(run), "--json"], log.with_suffix(".second"), forked=True)
        second.wait(PATIENCE)
        told = second.status == 2 and f"process {process.pid}" in second.said()
        if process.running() and not told:
            fault(f"a second trainer left with {second.status}: {second.said()[-300:]}")
    found["hit"] = hit(process, name, target, chooser)
    if not process.wait(PATIENCE):
        fault(f"it still ran {PATIENCE:.0f} s after the signal")
        process.send(signal.SIGKILL, group=True)
        process.wait(10)
    process.send(signal.SIGKILL, group=True)  # workers whose launcher is gone
    settle(run)
    said = process.said()
    found["status"] = process.status
    if "Traceback" in said and found["hit"] and not (slow and name == "KILL"):
        fault(f"traceback: {said[-1500:]}")
    if name in REQUEST and moment != "start" and found["hit"] and process.status not in (130, 0):
        fault(f"it left with {process.status}: {said[-600:]}")
    checkpoints = read.list_checkpoints(run) if run.exists() else []
    found["step"] = int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else 0
    if checkpoints and (damage := verify.verify(checkpoints[-1]).damage):
        fault(f"the newest checkpoint is damaged: {damage[0]}")
    steps = [row["step"] for row in rows(run)] if run.exists() else []
    if steps != list(range(1, len(steps) + 1)) or len(steps) < found["step"]:
        fault(f"rows of steps {steps[-5:]} beside a checkpoint of step {found['step']}")
    if name in REQUEST and process.status == 130 and moment != "start" and leftovers(run, checkpoints):
        fault(f"left behind: {leftovers(run, checkpoints)}")
    return found


def settle(run: Path) -> None:
    """Wait until no process holds the run: those of a group that was killed end one after the other."""
    import fcntl

    file = run / OWNER
    end = time.monotonic() + 10
    while file.exists() and time.monotonic() < end:
        with file.open("rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                time.sleep(0.02)


def leftovers(run: Path, checkpoints: list[Path]) -> list[str]:
    """What lies in a run that should not."""
    wanted = {"recipe.yaml", "metrics.jsonl", "samples.jsonl", "checkpoints"}
    inside = {path.name for path in (run / "checkpoints").iterdir()} - {path.name for path in checkpoints}
    return sorted({path.name for path in run.iterdir()} - wanted | inside)


def finish(run: Path, whole: Path, log: Path, *, launched: bool) -> list[str]:
    """Let the run come to its end and compare it with the one that nobody touched."""
    process = Process(["resume", str(run), "--json"], log, forked=not launched)
    if not process.wait(600) or process.status:
        process.send(signal.SIGKILL, group=True)
        return [f"the last resume left with {process.status}: {process.said()[-1500:]}"]
    faults, ours, theirs = [], Run(run), Run(whole)
    if ours.newest().digest != theirs.newest().digest:
        faults.append("the final digest differs")
    names = ("step", "tokens", "loss", "learning_rate", "grad_norm", "held-out/loss")
    if [[row.get(name) for name in names] for row in ours.metrics()] != [[row.get(name) for name in names] for row in theirs.metrics()]:
        faults.append("rows differ")
    if left := leftovers(run, ours.checkpoints()):
        faults.append(f"left behind: {left}")
    return faults


def plan(count: int) -> Iterator[tuple[int, list[tuple[str, str, str]]]]:
    """Runs by number, with the kinds of signals that hit each; one in eight is of two processes."""
    chooser, left, number = random.Random(7), count, 0
    while left > 0:
        launched = number % 8 == 7
        size = min(left, len(LAUNCHED) if launched else EACH)
        kinds = LAUNCHED[:size] if launched else [KINDS[(number * EACH + place) % len(KINDS)] for place in range(size)]
        yield number, chooser.sample(kinds, len(kinds))
        left, number = left - size, number + 1


def untouched(folder: Path, name: str, recipe: dict[str, Any]) -> Path:
    """A run from its beginning to its end, made once."""
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    run = folder / name
    if not read.list_checkpoints(run) or read.open(run).step != STEPS:
        shutil.rmtree(run, ignore_errors=True)
        launched = "parallel" in recipe
        process = Process(["train", str(folder / f"{name}.yaml"), "--run", str(run), "--json"], folder / f"{name}.log", forked=not launched)
        if not process.wait(900) or process.status:
            raise SystemExit(f"the untouched run failed: {process.said()[-3000:]}")
    return run


def all_trials(folder: Path, count: int, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every signal, those of an earlier call first."""
    done = folder / "done.jsonl"
    known = {row["run"]: row for row in map(json.loads, done.read_text().splitlines())} if done.exists() else {}
    for number, kinds in plan(count):
        if number in known:
            continue
        launched = kinds[0] in LAUNCHED
        recipe = {**RECIPE, "parallel": {"data": 2}} if launched else RECIPE
        name = "whole-2" if launched else "whole"
        whole, run = untouched(folder, name, recipe), folder / f"run-{number}"
        shutil.rmtree(run, ignore_errors=True)
        chooser, trials = random.Random(f"{number}"), []
        for place, kind in enumerate(kinds):
            began = time.monotonic()
            trials.append(trial(run, folder / f"{name}.yaml", kind, chooser, folder / f"run-{number}-{place}.log"))
            trials[-1]["seconds"] = round(time.monotonic() - began, 1)
            tell(f"run {number}: {trials[-1]}")
        faults = finish(run, whole, folder / f"run-{number}-end.log", launched=launched)
        tell(f"run {number}: {faults or 'equal'}")
        known[number] = {"run": number, "signals": trials, "faults": faults}
        with done.open("a") as file:
            file.write(json.dumps(known[number]) + "\n")
        if not faults and not any(each["faults"] for each in trials):
            shutil.rmtree(run)
    return [known[number] for number, _ in plan(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--signals", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where runs and what is done are kept; default: a folder that is removed")
    parser.add_argument("--dry", action="store_true", help="print, and write no record")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has those that it starts in the background ignore it
    folder = arguments.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    runs = all_trials(folder, arguments.signals, lambda text: print(text, file=sys.stderr, flush=True))
    if arguments.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    signals = [each for run in runs for each in run["signals"]]
    counted = [each for each in signals if each["hit"]]
    faulty = [each for each in signals if each["faults"]]
    table = [
        ("signals sent", len(signals)),
        ("... to a process that was still there", len(counted)),
        *((f"... {moment}", sum(each["moment"] == moment for each in counted)) for moment in MOMENTS),
        *((f"... {name}", number) for name, number in sorted(Counter(f"{each['signal']} to a {each['target']}" for each in counted).items())),
        ("newest checkpoint sound, rows complete, nobody waits, status as promised", f"{len(signals) - len(faulty)} of {len(signals)}"),
        ("runs that came to their end bit-equal, with every row once and nothing left behind", f"{sum(not run['faults'] for run in runs)} of {len(runs)}"),
    ]
    if arguments.dry:
        for row in table:
            print(*row, sep="\t")
        for run in runs:
            print(run["faults"], *(each for each in run["signals"] if each["faults"]), sep="\n")
        return
    record.write(
        "resume_kills",
        "Signals at random moments",
        f"python benchmarks/resume_kills.py --signals {arguments.signals}",
        ("", "count"),
        table,
        "A small LLaMA trains with a checkpoint at every step, in one process or in two, and is hit by signals of every kind at random moments: while it "
        "starts, computes and writes. It is started again each time, and its end is compared with that of a run that nobody touched.",
        {"runs": runs},
    )


if __name__ == "__main__":
    main()
