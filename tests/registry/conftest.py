"""A small zoo: a run of two processes' worth of history, a fork, an average, an export, a merge. Made once, read only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def zoo(small_recipe, tmp_path_factory) -> Path:
    """`run` (trained to 10, resumed to 20), `branch` (forked from step 10), `average`, `bf16` (an export of it), `mixed` (run and branch)."""
    import cairn
    from cairn.training.run import fork, resume, train

    folder = tmp_path_factory.mktemp("zoo")
    train(small_recipe, folder / "run", stop_at_step=10)
    run = resume(folder / "run")
    branch = fork(run.checkpoints()[1], folder / "branch", ["optimizer.lr=1e-4", "seed=9"], fresh=["optimizer"])
    cairn.average([folder / "run"], folder / "average", last=2)
    cairn.export(folder / "average", folder / "bf16", dtype="bfloat16")
    cairn.merge("slerp", [run.checkpoints()[-1], branch.checkpoints()[-1]], folder / "mixed", {"t": 0.3})
    cairn.evaluate(folder / "run", [{"name": "held-out", "sequences": 8}])
    return folder


@pytest.fixture
def index(zoo, tmp_path):
    """An index of the zoo."""
    from cairn.registry.index import Index

    with Index(tmp_path / "index.sqlite") as opened:
        opened.add(zoo)
        yield opened


def edit_json(path: Path, change) -> None:
    """Load a JSON file, let `change` alter it, and write it back."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
