"""The registry's commands: one JSON document each, exit statuses, and no torch for what only looks."""

import shutil

import pytest

from tests.cli.conftest import cairn  # noqa: F401
from tests.cli.test_cli_startup import HEAVY, loaded, run
from tests.faults import flip


def test_index_search_describe_claim_and_forget(cairn, zoo, tmp_path):  # noqa: F811
    shutil.copytree(zoo, tmp_path / "zoo")
    file = tmp_path / "i.sqlite"
    assert cairn("index", tmp_path / "zoo", "--index", file, "--json").document["checkpoints"] == 9
    assert cairn("describe", tmp_path / "zoo/mixed", "license=mit", "--json").document == {"license": "mit"}
    made = cairn("claim", tmp_path / "zoo/mixed", "accuracy", 0.7, "n=100", "split=test", "--task", "choice", "--json").document
    assert made["value"] == 0.7 and made["task"] == {"name": "choice"}
    assert cairn("index", "--index", file, "--json").document["opened"] >= 1
    (row,) = cairn("search", "license:mit", "--index", file, "--json").document["rows"]
    assert row["title"] == "mixed"
    assert "0 of 9" in cairn("search", "license:gpl", "--index", file).out
    assert cairn("index", "--forget", tmp_path / "zoo", "--index", file, "--json").document["checkpoints"] == 0
    assert cairn("describe", tmp_path / "zoo/mixed", "colour=red").status == 2


def test_verify_all_and_replay_leave_with_status_1_when_the_answer_is_no(cairn, zoo, tmp_path):  # noqa: F811
    shutil.copytree(zoo, tmp_path / "zoo")
    assert cairn("verify", "--all", tmp_path / "zoo", "--json").document["sound"]
    assert cairn("replay", tmp_path / "zoo/average", "--json").document["outcome"] == "bitwise"
    flip(tmp_path / "zoo/mixed/model.safetensors", 5000)
    answer = cairn("verify", "--all", tmp_path / "zoo")
    assert answer.status == 1 and "mixed" in answer.out and "1 damaged" in answer.out
    flip(tmp_path / "zoo/run/checkpoints/step-00000020/model.safetensors", 5003)
    answer = cairn("replay", tmp_path / "zoo/average")
    assert answer.status == 2 and "step-00000020" in answer.err, "a parent that is damaged is bad input, named"
    assert cairn("verify", "--all", tmp_path / "nothing").status == 2


def test_diff_prints_results(cairn, zoo):  # noqa: F811
    steps = [zoo / "run/checkpoints" / name for name in ("step-00000015", "step-00000020")]
    assert {row["metric"] for row in cairn("diff", *steps, "--json").document["results"]} == {"loss", "bits_per_byte"}
    assert "bits_per_byte" in cairn("diff", *steps).out


@pytest.mark.parametrize("command", [("index",), ("search", "llama")], ids=" ".join)
def test_looking_does_not_load_torch(zoo, tmp_path, command):
    assert not loaded(run(*command, "--index", tmp_path / "i.sqlite")) & HEAVY
