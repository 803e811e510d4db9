"""Lines for torchrun in the documentation: its own parser must leave ours what is ours."""

import shlex
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

DOCS = Path(__file__).parents[2] / "docs"
LINES = [line for page in sorted(DOCS.rglob("*.md")) for line in page.read_text().splitlines() if line.startswith("torchrun ")]


@pytest.mark.parametrize("line", LINES)
def test_torchrun_understands_it(line):
    words = [word for word in shlex.split(line, comments=True)[1:] if word != "..."]
    parsed = parse_args(words)
    assert parsed.module and parsed.training_script == "cairn"
    assert parsed.training_script_args == words[words.index("cairn") + 1 :]


def test_there_are_such_lines():
    assert len(LINES) >= 3
