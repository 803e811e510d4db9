"""What a save at every step costs: lazy capture beside torch.save and torch.distributed.checkpoint, in one process.

    python benchmarks/lazy_saves.py [--rounds 5]

The contestants and what a stall is are those of the study `lazysave`; each round runs all of them, in a rotating order. One more shows what the
memory traffic of a save costs whoever makes it: a thread copies the state and writes it to a file, with no digests, no flush and no name to publish.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import record
import torch

from cairn.checkpoint.saving.modules import module_tensors, optimizer_tensors
from cairn.studies.checkpoint.lazysave import CONTESTANTS, LENGTH, SEQUENCES, STEPS, Loop, copy_seconds, race, rotated

WORDS = (
    f"A LLaMA of 10M parameters (120 MB with its moments) trains {STEPS} steps of {SEQUENCES * LENGTH} tokens in a plain loop, {{threads}} threads, "
    "and saves every one; {rounds} rounds in rotating order. Times are medians, ratios are medians of the rounds' own ratios. A stall is what a saver "
    "holds the loop up; the loop is timed from its first step to its last, all on disk also has what is written after it. One plain copy of the state "
    "takes {copy:.0f} ms, so {steps} copies {copies:.2f} s, the price of the copies alone. What copies and writes cost together, while two cores train, "
    "the line `{traffic}` shows: a thread copies the state and writes it to a new file, without digests, flushes or anything that makes a checkpoint of it. "
    "The price of the traffic is what its loop takes longer than the one without saving, in the same round."
)
TRAFFIC = "plain copies and writes"


@contextlib.contextmanager
def traffic(loop: Loop, folder: Path) -> Iterator[tuple[Callable[[], object], Callable[[int], object]]]:
    """The state goes through memory as in any save: one copy, one write. The next update waits for the copy, the next save for the write."""
    buffers: list[torch.Tensor] = []
    copied: list[Future[None]] = []
    written: list[Future[None]] = []

    def tensors() -> list[torch.Tensor]:
        return [*module_tensors(loop.model).values(), *optimizer_tensors(loop.model.named_parameters(), [loop.optimizer]).values()]

    def copy(state: list[torch.Tensor]) -> None:
        torch.set_num_threads(1)
        for buffer, tensor in zip(buffers, state, strict=True):
            buffer.copy_(tensor)

    def write(step: int) -> None:
        with (folder / f"{step}.bin").open("wb", buffering=0) as file:
            for buffer in buffers:
                file.write(buffer.reshape(-1).view(torch.uint8).numpy().data)

    def before() -> None:
        while copied:
            copied.pop().result()

    with ThreadPoolExecutor(1) as pool:

        def after(step: int) -> None:
            while written:
                written.pop().result()
            state = tensors()
            if not buffers:
                buffers.extend(tensor.clone() for tensor in state)
            copied.append(pool.submit(copy, state))
            written.append(pool.submit(write, step))

        yield before, after
        before()


ALL = CONTESTANTS | {TRAFFIC: traffic}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        race(0, Path(folder), 4, ALL)  # memory and files touched for the first time
        for number in range(arguments.rounds):
            rounds.append(race(number, Path(folder), STEPS, rotated(ALL, number)))
    loop = Loop.begin(0)
    loop.run(0, 1, lambda: None, lambda step: None)
    copy = copy_seconds(loop)

    def ratio(name: str, figure: str, peer: str) -> float:
        return record.median_ratio([r[name][figure] for r in rounds], [r[peer][figure] for r in rounds])

    rows, prices = [], [r[TRAFFIC]["seconds"] - r["no saving"]["seconds"] for r in rounds]
    for name in ALL:
        stall, seconds, disk = (statistics.median(r[name][figure] for r in rounds) for figure in ("stall", "seconds", "to_disk"))
        own = ratio("lazy", "stall", name) if name != "no saving" else "-"
        bare = statistics.median(r[name]["seconds"] / (r["no saving"]["seconds"] + (STEPS * copy if name != "no saving" else 0)) for r in rounds)
        beside = statistics.median((r[name]["seconds"] - price) / r["no saving"]["seconds"] for r, price in zip(rounds, prices, strict=True))
        rows.append([name, 1000 * stall, own, seconds, ratio(name, "seconds", "no saving"), bare, beside if name != "no saving" else 1.0, disk])
    record.write(
        "lazy_saves",
        "A save at every step",
        f"python benchmarks/lazy_saves.py --rounds {arguments.rounds}",
        [
            "saver",
            "stall, ms",
            "lazy's stall / its stall",
            "loop, s",
            "loop / no saving",
            "loop / (no saving + copies)",
            "(loop - price of the traffic) / no saving",
            "all on disk, s",
        ],
        rows,
        WORDS.format(threads=torch.get_num_threads(), rounds=arguments.rounds, copy=1000 * copy, copies=STEPS * copy, steps=STEPS, traffic=TRAFFIC),
        {"rounds": rounds, "copy_seconds": copy},
    )


if __name__ == "__main__":
    main()
