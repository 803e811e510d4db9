"""The registry with thousands of checkpoints: indexing, looking for what is new, searching, pages.

python benchmarks/registry.py [--checkpoints 2000] [--rounds 20]

Checkpoints are real ones, tiny, written by the library's own writer: 20 to a run, each run forked from an earlier one, every tenth
checkpoint with a result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch

from cairn.checkpoint.format import read
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.saving.write import save
from cairn.registry.index import Index

IN_RUN = 20
AIMS = {"search": 0.02, "page": 0.2}
"""Seconds: a search, a page."""


def zoo(folder: Path, count: int) -> None:
    """So many checkpoints in runs of twenty."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "vocab_size": 16, "max_position_embeddings": 64}
    previous = None
    for number in range(count):
        run, place = divmod(number, IN_RUN)
        home = folder / f"run-{run:04d}"
        if place == 0:
            home.mkdir(parents=True)
            recipe = {"training": {"tokens": "20 steps", "batch": 1024}, "data": {"sources": {"docs": {"corpus": "python-docs"}}}, "seed": run}
            (home / "recipe.yaml").write_text(json.dumps(recipe))
            rows = [{"step": s, "tokens": 1024 * s, "loss": 5 / s, "learning_rate": 1e-3, "tokens_per_second": 1e4} for s in range(1, IN_RUN + 1)]
            (home / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            # A run begins from the run whose number is half of its own: a tree of forks.
            previous = read.open(folder / f"run-{run // 2:04d}/checkpoints/step-{IN_RUN:08d}") if run else None
        path = home / "checkpoints" / f"step-{place + 1:08d}"
        lineage = Lineage.record(
            "run", "fork" if place == 0 and run else "train", parents=[previous] if previous else [], options={"recipe": recipe}, directory=path.parent
        )
        weights = {"model.embed_tokens.weight": torch.full((16, 8), float(number))}
        trainer = {"step": place + 1, "tokens": 1024 * (place + 1)}
        previous = save(path, model=weights, config=config, lineage=lineage, trainer=trainer)
        if number % 10 == 0:
            _result(home, previous)


def _result(home: Path, checkpoint: Any) -> None:
    (home / "results").mkdir(exist_ok=True)
    score = {"task": "held-out", "metric": "loss", "value": 2.0, "stderr": 0.1, "n": 100, "chance": None}
    document = {"model_digest": checkpoint.model_digest, "protocol_digest": "0" * 64, "protocol": {"name": "held-out"}, "scores": [score]}
    (home / "results" / f"{checkpoint.model_digest[:16]}-{'0' * 16}.json").write_text(json.dumps(document))


def timed(call: Callable[[], object], rounds: int) -> list[float]:
    call()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoints", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    from starlette.testclient import TestClient

    from cairn.registry.web.app import create_app

    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as work:
        zoo(Path(work) / "zoo", given.checkpoints)
        with Index(Path(work) / "i.sqlite") as index:
            began = time.perf_counter()
            report = index.add(Path(work) / "zoo")
            times["index from nothing"] = [time.perf_counter() - began]
            assert report.checkpoints == given.checkpoints and not report.problems
            times["look for what is new"] = timed(index.refresh, given.rounds)
            for query in ("docs", "family:llama step>=10", "held-out:loss<3 tokens>=10k", "run:run-0007"):
                times[f"search {query}"] = timed(lambda query=query: index.search(query), given.rounds)
            key = index.search("step=20").rows[0]["key"]
            other, run = index.search("step=10").rows[0]["key"], index.rows("SELECT key FROM runs LIMIT 1")[0]["key"]
            client = TestClient(create_app(index.path), base_url="http://127.0.0.1")
            pages = {"overview": "/", "runs": "/runs", "run": f"/run/{run}", "live part": f"/run/{run}/live", "checkpoints": "/checkpoints?q=llama"}
            pages |= {"checkpoint": f"/checkpoint/{key}", "card": f"/checkpoint/{key}/card", "risks": f"/checkpoint/{key}/risks", "lineage": f"/lineage/{key}"}
            pages |= {"comparison": f"/compare?c={key}&c={other}"}
            for name, address in pages.items():
                assert client.get(address).status_code == 200, address
                times[f"page: {name}"] = timed(lambda address=address: client.get(address), given.rounds)
    rows = [(name, 1000 * statistics.median(values), 1000 * max(values), _aim(name)) for name, values in times.items()]
    words = (
        f"{given.checkpoints} checkpoints in runs of {IN_RUN}, forked from one another, on a local disk; "
        f"{given.rounds} rounds each after one that does not count. "
        "Pages are asked for in the same process, without a browser."
    )
    command = f"python benchmarks/registry.py --checkpoints {given.checkpoints} --rounds {given.rounds}"
    record.write("registry", "The registry with thousands of checkpoints", command, ("", "median ms", "max ms", "aim ms"), rows, words, times)


def _aim(name: str) -> str:
    return next((f"{1000 * seconds:.0f}" for kind, seconds in AIMS.items() if name.startswith(kind)), "-")


if __name__ == "__main__":
    main()
