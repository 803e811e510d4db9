"""The stairs: an import upwards is found wherever it hides, and this repository has none."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checker():
    spec = importlib.util.spec_from_file_location("check_imports", ROOT / "tools" / "check_imports.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_imports"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["check_imports"]


def test_this_house_is_in_order(checker):
    assert checker.check(ROOT / "src" / "cairn") == []


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("checkpoint/a.py", "from cairn.models import config"),
        ("checkpoint/a.py", "import cairn.training.loop"),
        ("data/a.py", "def late():\n    from cairn.training.recipe import Recipe"),
        ("models/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from cairn.evaluation.measure import Row"),
        ("models/families/a.py", "from ...generation import cache"),
        ("training/a.py", "from cairn import evaluate"),
        ("training/a.py", "from cairn import open"),
        ("training/a.py", "import importlib\nimportlib.import_module('cairn.evaluation.measure')"),
        ("errors.py", "from cairn.checkpoint.format.read import open"),
        ("evaluation/a.py", "from cairn.cli import console"),
        ("evaluation/a.py", "from cairn.merging import combine"),
        ("merging/a.py", "from cairn.continual.pretrain import anneal"),
        ("checkpoint/format/a.py", "from cairn.checkpoint.saving.write import Writer"),
        ("checkpoint/memory/a.py", "def late():\n    from cairn.checkpoint.operating import walk"),
        ("attic/a.py", ""),
    ],
)
def test_climbing_the_stairs_is_found(checker, tmp_path, file, code):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(code)
    (breach,) = checker.check(tmp_path)
    assert breach.file == file


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("models/a.py", "from cairn.data import tokens"),
        ("training/a.py", "from cairn.checkpoint.format.read import open\nfrom cairn import catalog, errors"),
        ("training/callbacks/a.py", "from . import b\nfrom ...data import feed\nimport torch"),
        ("cli/a.py", "from cairn.studies import runner\nfrom cairn.studies import demo"),
    ],
)
def test_going_down_and_along_is_free(checker, tmp_path, file, code):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(code)
    assert checker.check(tmp_path) == []


@pytest.mark.parametrize(
    "late",
    ["from cairn.data.b import y", "def f():\n    from cairn.data import b", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import cairn.data.b"],
)
def test_modules_that_import_each_other_are_found_wherever_the_import_hides(checker, tmp_path, late):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.py").write_text(late)
    (tmp_path / "data" / "b.py").write_text("from cairn.data.a import x")
    (breach,) = checker.check(tmp_path)
    assert "circle" in breach.sentence and breach.file == "data/a.py"
