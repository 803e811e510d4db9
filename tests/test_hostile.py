"""A short version of benchmarks/hostile_files.py: a few hundred altered checkpoints and runs, read by every command and by the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

INPUTS = 300
CODE = """
import json, sys
from pathlib import Path
from tests.hostile import Arena, plain
arena = Arena(Path(sys.argv[1]))
arena.watch()
for number in range(int(sys.argv[2])):
    print(json.dumps(plain(arena.attack(number))), file=sys.__stderr__)
"""


def test_altered_files_never_do_more_than_be_refused(tmp_path):
    for needed in ("transformers", "starlette", "jinja2", "upath"):
        pytest.importorskip(needed)
    place = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path), str(INPUTS)], env=os.environ | place, capture_output=True, text=True, timeout=600, check=False
    )
    outcomes = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"number"')]
    assert len(outcomes) == INPUTS, done.stderr[-3000:]
    assert [outcome for outcome in outcomes if outcome["problem"]] == []
    assert sum(outcome["status"] == 2 for outcome in outcomes) > INPUTS / 5, "hardly anything was refused: the changes do not reach what is read"
    assert len({outcome["command"] for outcome in outcomes}) > 15
