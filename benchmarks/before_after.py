"""What a change of the code did to its own benchmarks: two commits in turn, on one machine, in one go.

    python benchmarks/before_after.py COMMIT [--turns 2] [--folder DIR] [--only train_step,save_load]

COMMIT is checked out beside this tree, and both run their own copy of each benchmark, first the one, then the other, then in the
reverse order. Each figure is cairn's time over that of a peer which did not change, in the same round, so that what the machine
does meanwhile falls on both; the table gives the medians over all rounds before and after, and their ratio with the interval
that resampling the rounds gives (95 %).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import record

HERE = Path(__file__).parent.parent
Ratios = dict[str, list[float]]


def over(ours: Sequence[float], peer: Sequence[float]) -> list[float]:
    """The rounds' own ratios."""
    return [a / b for a, b in zip(ours, peer, strict=True)]


def train_step(raw: dict[str, Any]) -> Ratios:
    """A training step, to transformers' eager loop."""
    times = raw["times"]
    return {f"step, {kind}": over(times[f"cairn, {kind}"], times["transformers, eager, memory kept"]) for kind in ("compiled", "eager")}


def save_load(raw: dict[str, Any]) -> Ratios:
    """Saving and loading, to torch's own."""
    return {kind: over(raw[f"{kind}s"]["cairn (digests included)"], raw[f"{kind}s"]["torch.save / torch.load"]) for kind in ("save", "load")}


def layouts_load(raw: dict[str, Any]) -> Ratios:
    """Loading in another layout, to a plain reading; of the slowest rank in each round."""
    found = {}
    for cut in ("rows", "columns"):
        times = {who: [max(of) for of in zip(*(rank[cut]["times"][who] for rank in raw["ranks"]), strict=True)] for who in ("ours", "plain")}
        found[f"load {cut}"] = over(times["ours"], times["plain"])
    return found


def merge(raw: dict[str, Any]) -> Ratios:
    """Merging, to mergekit."""
    seconds = {method: {who: [each["seconds"] for each in runs] for who, runs in found.items()} for method, found in raw["found"].items()}
    return {method: over(times["cairn"], times["mergekit"]) for method, times in seconds.items() if times.get("mergekit")}


def score_requests(raw: dict[str, Any]) -> Ratios:
    """Requests, to the harness's own class."""
    return {name: over(times["cairn"], times["hf"]) for name, times in raw.items() if isinstance(times, dict) and "hf" in times}


BENCHMARKS: dict[str, tuple[Callable[[dict[str, Any]], Ratios], str, list[str]]] = {
    "train_step": (train_step, "transformers, eager, memory kept", ["--rounds", "12"]),
    "save_load": (save_load, "torch.save, torch.load", ["--rounds", "5"]),
    "layouts_load": (layouts_load, "plain reading", ["--rounds", "5"]),
    "merge": (merge, "mergekit", ["--rounds", "2", "--methods", "linear,ties,task-arithmetic"]),
    "score_requests": (score_requests, "the harness's hf class", ["--rounds", "2", "--threads", "2"]),
}
"""Name: how its figures are read, the peer, and the options that it is run with."""


def interval(before: list[float], after: list[float], draws: int = 2000) -> tuple[float, float]:
    """95 % of the ratios of medians of resampled rounds."""
    drawn = random.Random(0)
    ratios = sorted(statistics.median(drawn.choices(after, k=len(after))) / statistics.median(drawn.choices(before, k=len(before))) for _ in range(draws))
    return ratios[round(0.025 * draws)], ratios[round(0.975 * draws) - 1]


def once(tree: Path, name: str, options: list[str]) -> dict[str, Any]:
    """Run a tree's own benchmark; its record is read and put back as it was."""
    kept = tree / "docs" / "benchmarks" / f"{name}.json"
    saved = {path: path.read_bytes() for path in (kept, kept.with_suffix(".md")) if path.exists()}
    try:
        environment = os.environ | {"PYTHONPATH": str(tree / "src")}
        subprocess.run([sys.executable, str(tree / "benchmarks" / f"{name}.py"), *options], env=environment, check=True, stdout=subprocess.DEVNULL)
        raw: dict[str, Any] = json.loads(kept.read_text())["raw"]
        return raw
    finally:
        for path, data in saved.items():
            path.write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("commit", help="the code before")
    parser.add_argument("--turns", type=int, default=2, help="times that each side runs each benchmark")
    parser.add_argument("--only", default=",".join(BENCHMARKS))
    parser.add_argument("--folder", type=Path, default=None, help="where the older tree is checked out")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="before-", dir=arguments.folder))
    older = folder / "tree"
    subprocess.run(["git", "worktree", "add", "--detach", str(older), arguments.commit], cwd=HERE, check=True, capture_output=True)
    rows, kept = [], {}
    try:
        for name in arguments.only.split(","):
            read, peer, options = BENCHMARKS[name]
            found: dict[str, Ratios] = {"before": {}, "after": {}}
            for turn in range(arguments.turns):
                sides = [("before", older), ("after", HERE)]
                for side, tree in sides if turn % 2 == 0 else reversed(sides):
                    for figure, ratios in read(once(tree, name, options)).items():
                        found[side].setdefault(figure, []).extend(ratios)
            kept[name] = found
            for figure, before in found["before"].items():
                after = found["after"][figure]
                low, high = interval(before, after)
                medians = statistics.median(before), statistics.median(after)
                rows.append([name, figure, peer, *(f"{value:.3f}" for value in medians), f"{medians[1] / medians[0]:.3f}", f"{low:.3f} to {high:.3f}"])
                print(*rows[-1], sep=" | ", flush=True)
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(older)], cwd=HERE, check=False, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)
    record.write(
        "before_after",
        f"Benchmarks before and after: {arguments.commit} and now",
        f"python benchmarks/before_after.py {arguments.commit} --turns {arguments.turns} --only {arguments.only}",
        ["benchmark", "figure", "peer", "before, x the peer's time", "after, x the peer's time", "after / before", "95 % of resampled rounds"],
        rows,
        "Each side runs its own copy of each benchmark in turn. A time over that of a peer that did not change, in the same round; medians over all rounds.",
        kept,
    )


if __name__ == "__main__":
    main()
