"""How long it takes to import cairn and to see the help.

python benchmarks/startup.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

import record

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import cairn": ["-c", "import cairn"],
    "cairn --help": ["-m", "cairn", "--help"],
    "cairn catalog": ["-m", "cairn", "catalog"],
    "cairn data list": ["-m", "cairn", "data", "list"],
    "import torch": ["-c", "import torch"],
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(rounds + 1):
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            if number:
                times[name].append(time.perf_counter() - began)
    rows = [(name, statistics.median(values), min(values), max(values)) for name, values in times.items()]
    words = f"Whole processes, {rounds} rounds, the interpreter's own start included."
    record.write("startup", "Starting up", f"python benchmarks/startup.py --rounds {rounds}", ("", "median s", "min s", "max s"), rows, words, times)


if __name__ == "__main__":
    main()
