"""What a save at every step costs: lazy capture beside torch.save and torch.distributed.checkpoint, in one process.

    python benchmarks/lazy_saves.py [--rounds 5]

The contestants and what a stall is are those of the study `lazysave`; each round runs all of them, in a rotating order.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import record
import torch

from cairn.studies.checkpoint.lazysave import CONTESTANTS, LENGTH, SEQUENCES, STEPS, Loop, copy_seconds, race

WORDS = (
    f"A LLaMA of 10M parameters (120 MB with its moments) trains {STEPS} steps of {SEQUENCES * LENGTH} tokens in a plain loop, {{threads}} threads, "
    "and saves every one; {rounds} rounds in rotating order. Times are medians, ratios are medians of the rounds' own ratios. A stall is what a saver "
    "holds the loop up; the loop is timed from its first step to its last, all on disk also has what is written after it. One plain copy of the state "
    "takes {copy:.0f} ms, so {steps} copies {copies:.2f} s: the price of the memory traffic alone."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    names, rounds = list(CONTESTANTS), []
    with tempfile.TemporaryDirectory() as folder:
        race(0, Path(folder), 3)  # memory and files touched for the first time
        for number in range(arguments.rounds):
            turn = number % len(names)
            rounds.append(race(number, Path(folder), STEPS, names[turn:] + names[:turn]))
    loop = Loop.begin(0)
    loop.run(0, 1, lambda: None, lambda step: None)
    copy = copy_seconds(loop)

    def ratio(name: str, figure: str, peer: str) -> float:
        return record.median_ratio([r[name][figure] for r in rounds], [r[peer][figure] for r in rounds])

    rows = []
    for name in names:
        stall, seconds, disk = (statistics.median(r[name][figure] for r in rounds) for figure in ("stall", "seconds", "to_disk"))
        own = ratio("lazy", "stall", name) if name != "no saving" else "-"
        bare = statistics.median(r[name]["seconds"] / (r["no saving"]["seconds"] + (STEPS * copy if name != "no saving" else 0)) for r in rounds)
        rows.append([name, 1000 * stall, own, seconds, ratio(name, "seconds", "no saving"), bare, disk])
    record.write(
        "lazy_saves",
        "A save at every step",
        f"python benchmarks/lazy_saves.py --rounds {arguments.rounds}",
        ["saver", "stall, ms", "lazy's stall / its stall", "loop, s", "loop / no saving", "loop / (no saving + copies)", "all on disk, s"],
        rows,
        WORDS.format(threads=torch.get_num_threads(), rounds=arguments.rounds, copy=1000 * copy, copies=STEPS * copy, steps=STEPS),
        {"rounds": rounds, "copy_seconds": copy},
    )


if __name__ == "__main__":
    main()
