"""Hostile files: what does reading an altered checkpoint or run do? Nothing that it should not.

    python benchmarks/hostile_files.py [--inputs 100000] [--processes 1] [--work FOLDER] [--first 0]

Each input is one change of one file, header, link or name of a run, a merge, a sharded export, a hub cache or a foreign family, often
with the manifest sealed again, read by one command or by the page. Child processes with an audit hook run thousands of inputs each.
Counted are tracebacks, what takes longer than 5 s, files opened outside the folder, connections, and code that ran. With --work the
outcomes are kept there, and a second call goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record

sys.path.insert(0, str(Path(__file__).parent.parent))

EACH = 20_000
"""Inputs of one child, which needs some seconds to load everything."""
LOADING, SILENT = 900.0, 120.0
"""Seconds after which a child that says nothing is taken to hang where not even a signal reaches it, before its first word and later."""
PROBLEMS = ("traceback", "hang", "outside", "connection", "code")


def child(root: Path, first: int, count: int) -> None:
    """Attack `count` inputs from `first` on; one line each on stdout."""
    from tests.hostile import Arena, plain

    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    arena = Arena(root)
    arena.watch()
    for number in range(first, first + count):
        print(json.dumps(plain(arena.attack(number))), file=out, flush=True)


def run(root: Path, first: int, count: int) -> Iterator[dict[str, Any]]:
    """The outcomes of a range of inputs, whatever happens to the children that attack them."""
    end = first + count
    while first < end:
        process = subprocess.Popen([sys.executable, __file__, "--child", str(root), str(first), str(min(EACH, end - first))], stdout=subprocess.PIPE)
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        rest, heard, patience = b"", time.monotonic(), LOADING
        while True:
            data = process.stdout.read()
            if data:
                heard, patience = time.monotonic(), SILENT
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    outcome = json.loads(line)
                    first = outcome["number"] + 1
                    yield outcome
            elif process.poll() is not None:
                break
            elif time.monotonic() - heard > patience:
                process.kill()
                process.wait()
                break
            else:
                time.sleep(0.02)
        if process.returncode != 0 and first < end:  # it died or was killed in the middle of one
            problem = "hang" if process.returncode == -9 else "traceback"
            yield {"number": first, "command": "?", "file": "?", "change": "?", "status": process.returncode, "problem": problem, "detail": "the process died"}
            first += 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--no-record", action="store_true", help="only say what was found")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(Path(arguments.child[0]), *map(int, arguments.child[1:]))
        return
    work = arguments.work or Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    work.mkdir(parents=True, exist_ok=True)
    kept = work / "outcomes.jsonl"
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    first = max((outcome["number"] + 1 for outcome in done), default=arguments.first)
    began = time.perf_counter()
    try:
        with kept.open("a") as file:
            for outcome in run(work / "attacked", first, arguments.first + arguments.inputs - first):
                done.append(outcome)
                file.write(json.dumps(outcome) + "\n")
                if outcome["problem"]:
                    print(json.dumps(outcome, indent=1), file=sys.stderr)
                if outcome["number"] % 1000 == 999:
                    print(f"{outcome['number'] + 1} inputs, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    finally:
        shutil.rmtree(work / "attacked", ignore_errors=True)
    if arguments.no_record:
        print(Counter(outcome["problem"] for outcome in done))
        return
    _record(done, arguments.inputs)
    if arguments.work is None:
        shutil.rmtree(work, ignore_errors=True)


def _record(done: list[dict[str, Any]], inputs: int) -> None:
    by_command: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for outcome in done:
        by_command[outcome["command"]].append(outcome)
    rows = [_row(command, outcomes) for command, outcomes in sorted(by_command.items())]
    rows.append(_row("all", done))
    kinds = Counter(f"{Path(outcome['file']).name.replace('step-', 'step ')[:40]}" for outcome in done)
    words = (
        "One change of one small file, header, link or name of a run, a merge, a sharded export, a hub cache or a family of transformers, half of them "
        "with the manifest sealed again, read by one command or by the pages. `refused`: exit status 2 with one sentence; `no`: exit status 1; `read`: "
        "the change did not matter to the command, or made another sound checkpoint. An audit hook sees every file, connection, process and piece of code."
    )
    raw = {"by_file": dict(kinds.most_common()), "problems": [outcome for outcome in done if outcome["problem"]]}
    columns = ("command", "inputs", "read", "no", "refused", "tracebacks", "hangs over 5 s", "reads outside", "connections", "code run")
    record.write("hostile_files", "Hostile files", f"python benchmarks/hostile_files.py --inputs {inputs}", columns, rows, words, raw)


def _row(command: str, outcomes: list[dict[str, Any]]) -> list[Any]:
    statuses, problems = Counter(outcome["status"] for outcome in outcomes), Counter(outcome["problem"] for outcome in outcomes)
    return [command, len(outcomes), statuses[0], statuses[1], statuses[2], *(problems[problem] for problem in PROBLEMS)]


if __name__ == "__main__":
    main()
