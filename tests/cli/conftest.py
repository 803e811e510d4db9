"""The command line, called in this process: fast, and exactly what the installed command does."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cairn.cli.main import main


@dataclass
class Answer:
    """What a command said and how it left."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Standard output as the one JSON document that it must be."""
        return json.loads(self.out)


@pytest.fixture
def cairn(monkeypatch, capsys) -> Callable[..., Answer]:
    """`cairn("show", path)` as on the command line."""

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["cairn", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        return Answer(int(left.value.code or 0), said.out, said.err)

    return call


@pytest.fixture(scope="session")
def recipe_file(small_recipe, tmp_path_factory) -> Path:
    """`small_recipe` as a user writes it."""
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(small_recipe))
    return path


@pytest.fixture(scope="session")
def wide_run(small_recipe, tmp_path_factory):
    """A run of another width."""
    from cairn.training.run import train

    return train(small_recipe, tmp_path_factory.mktemp("runs") / "wide", ["model.hidden_size=48", "training.tokens=2 steps"])


@pytest.fixture(scope="session")
def other_tokenizer_run(small_recipe, tmp_path_factory):
    """A run of the same shapes whose ids mean something else."""
    from cairn.training.run import train

    changes = ["data.tokenizer={bpe: 257}", "training.tokens=2 steps"]
    return train(small_recipe, tmp_path_factory.mktemp("runs") / "other-tokenizer", changes)
