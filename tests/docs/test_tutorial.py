"""The tutorial is run: its files are written, its commands are typed, its Python is executed, in its order; with a quarter of the tokens."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str, str]]:
    """(language, title, text) of each fenced block of the page."""
    return FENCE.findall(PAGE.read_text())


def shape(line: str) -> str:
    """The beginning of a line without its figures, which differ from machine to machine."""
    return re.sub(r"[0-9a-f]{12}|[\d.,]+", "#", " ".join(line.split()[:2]))


@pytest.mark.timeout(600)
def test_the_tutorial_works(tmp_path):
    pytest.importorskip("transformers")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for language, title, text in blocks():
        if title:
            assert "batch: 2048" in text
            (tmp_path / title).write_text(text.replace("batch: 2048", "batch: 512"))  # the page trains three times
        elif language == "console":
            lines = text.splitlines()
            commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
            assert commands, text
            done = subprocess.run(
                ["bash", "-euc", "\n".join(commands)], cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
            said = {shape(line) for line in (done.stdout + done.stderr).splitlines()}
            for line in lines:
                assert line.startswith("$ ") or shape(line) in said, f"'{line}' is promised; what came is\n{done.stdout}\n{done.stderr}"
        elif language == "python":
            done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0 and done.stdout, done.stderr
        else:
            assert language == "text", "a block that nobody runs"


def test_every_block_of_the_page_is_seen():
    assert PAGE.read_text().count("```") == 2 * len(blocks())
