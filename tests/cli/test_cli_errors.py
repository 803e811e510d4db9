"""Bad input of every kind: one plain sentence on stderr, the right exit status, nothing written and nothing lost."""

import errno
import os
import resource
import shutil
import subprocess
import sys

import pytest

from cairn.checkpoint.format import read
from tests import faults


def contents(folder):
    """Every file below a folder, hidden ones too, with its size and time of change."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(answer, *fragments):
    """The answer is one plain sentence that says all this."""
    assert answer.status == 2, answer
    assert answer.out == ""
    lines = answer.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("cairn: "), answer.err
    for fragment in fragments:
        assert fragment in lines[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "nowhere"),
        ("log", "nowhere"),
        ("verify", "nowhere"),
        ("diff", "nowhere", "nowhere"),
        ("resume", "nowhere"),
        ("fork", "nowhere", "--run", "new"),
        ("generate", "nowhere", "--prompt", "x"),
        ("evaluate", "nowhere"),
        ("average", "nowhere", "-o", "new"),
        ("merge", "linear", "nowhere", "-o", "new", "weights=[1]"),
        ("export", "nowhere", "-o", "new"),
        ("import", "nowhere", "-o", "new"),
        ("train", "nowhere.yaml", "--run", "new"),
        ("data", "prepare", "nowhere.txt", "-o", "new"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]) if arguments[0] == "data" else arguments[0],
)
def test_a_missing_file_is_named(cairn, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    refused(cairn(*arguments), "nowhere")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("shwo", "x"), ["shwo"]),
        (("train",), ["recipe"]),
        (("train", "dmeo", "--run", "new"), ["dmeo", "'demo'"]),
        (("train", "demo"), ["--run"]),
        (("train", "demo", "--run", "new", "optimizer.lrr=1"), ["lrr", "'lr'"]),
        (("train", "demo", "--run", "new", "optimizer.lr"), ["key=value"]),
        (("train", "demo", "--run", "new", "training.batch=4097"), ["4097", "128"]),
        (("train", "demo", "--run", "new", "training.tokens=soon"), ["soon", "20B tokens"]),
        (("train", "demo", "--run", "new", "schedule.name=cosin"), ["cosin", "'cosine'"]),
        (("train", "demo", "--dry-run", "--gpu", "h10"), ["h10", "'h100'"]),
        (("catalog", "operatoin"), ["operatoin", "'operation'"]),
        (("study", "resume-jmp"), ["resume-jmp", "'resume-jump'"]),
        (("data", "fetch", "blmip"), ["blmip", "'blimp'"]),
        (("data", "prepare", "python-dcos", "-o", "new"), ["python-dcos", "'python-docs'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_slip_of_the_pen_is_answered_with_the_nearest_right_word(cairn, tmp_path, monkeypatch, arguments, fragments):
    monkeypatch.chdir(tmp_path)
    refused(cairn(*arguments), *fragments)
    assert contents(tmp_path) == {}


def test_an_unknown_key_in_a_recipe_file_is_named_with_the_file(cairn, tmp_path, recipe_file):
    bad = tmp_path / "bad.yaml"
    bad.write_text(recipe_file.read_text().replace("hidden_size", "hiden_size"))
    refused(cairn("train", bad, "--run", tmp_path / "new"), "bad.yaml", "hiden_size", "'hidden_size'")
    bad.write_text("model: [")
    refused(cairn("train", bad, "--run", tmp_path / "new"), "bad.yaml", "YAML")
    bad.write_bytes(b"\xff\xfe\x00model")
    refused(cairn("train", bad, "--run", tmp_path / "new"), "bad.yaml")
    assert not (tmp_path / "new").exists()


def test_unknown_options_of_methods_are_named(cairn, tmp_path, small_run):
    refused(cairn("merge", "linear", small_run.path, "-o", tmp_path / "new", "weigths=[1]"), "weigths", "'weights'")
    refused(cairn("evaluate", small_run.path, "sequnces=3"), "sequnces", "'sequences'")
    refused(cairn("evaluate", small_run.path, "--tasks", "heldout"), "heldout", "'held-out'")
    refused(cairn("fork", small_run.path, "--run", tmp_path / "new", "--fresh", "optimzer"), "optimzer", "'optimizer'")
    refused(cairn("export", small_run.path, "-o", tmp_path / "new", "--dtype", "float31"), "float31", "float32")
    refused(cairn("export", small_run.path, "-o", tmp_path / "new", "--shard-size", "big"), "big", "4 GiB")
    refused(cairn("generate", small_run.path, "--prompt", "x", "--temperature", "-1"), "temperature")
    assert contents(tmp_path) == {}


def test_other_shapes_are_refused(cairn, tmp_path, small_run, wide_run):
    refused(cairn("average", small_run.path, wide_run.path, "-o", tmp_path / "new"), "32", "48")
    assert contents(tmp_path) == {}


def test_another_tokenizer_is_refused(cairn, tmp_path, small_run, other_tokenizer_run):
    refused(cairn("average", small_run.path, other_tokenizer_run.path, "-o", tmp_path / "new"), "tokenizer")
    refused(cairn("resume", small_run.path, "data.tokenizer={bpe: 300}"), "data", "fork")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("command", ["train", "fork", "average", "merge", "export", "data prepare"])
def test_nothing_is_ever_overwritten(cairn, tmp_path, recipe_file, corpus_file, small_run, command):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    arguments = {
        "train": ["train", recipe_file, "--run", mine],
        "fork": ["fork", small_run.path, "--run", mine],
        "average": ["average", small_run.path, "--last", 2, "-o", mine],
        "merge": ["merge", "linear", small_run.path, "weights=[1]", "-o", mine],
        "export": ["export", small_run.path, "-o", mine],
        "data prepare": ["data", "prepare", corpus_file, "-o", mine],
    }[command]
    refused(cairn(*arguments), "mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


def test_a_corrupt_block_is_found_and_named(cairn, tmp_path, small_run):
    copy = tmp_path / "copy"
    shutil.copytree(small_run.newest().path, copy)
    assert cairn("verify", copy).status == 0
    size = (copy / "model.safetensors").stat().st_size
    faults.flip(copy / "model.safetensors", size - 1)
    answer = cairn("verify", copy)
    assert answer.status == 1 and "model.safetensors" in answer.out and "block 0" in answer.out
    document = cairn("verify", copy, "--json").document
    assert not document["sound"] and document["damage"][0]["file"] == "model.safetensors"
    assert document["damage"][0]["tensors"]


def test_a_file_that_was_cut_is_refused_by_every_reader(cairn, tmp_path, small_run):
    copy = tmp_path / "copy"
    shutil.copytree(small_run.newest().path, copy)
    os.truncate(copy / "model.safetensors", 1000)
    for arguments in (["show", copy], ["generate", copy, "--prompt", "x"], ["evaluate", copy], ["average", copy, "-o", tmp_path / "new"]):
        refused(cairn(*arguments), "model.safetensors")
    assert cairn("verify", copy).status == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "quota")])
def test_a_full_disk_stops_an_operation_without_a_trace(cairn, tmp_path, small_run, monkeypatch, number, words):
    def full(*arguments):
        raise OSError(number, os.strerror(number))

    before = contents(small_run.path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(cairn("average", small_run.path, "--last", 2, "-o", tmp_path / "new"), words)
    assert contents(tmp_path) == {} and contents(small_run.path) == before


def test_a_run_outlives_a_full_disk(cairn, tmp_path, recipe_file, small_run):
    """A process that cannot write a whole checkpoint any more: the one before it stays, and the run goes on exactly."""
    run = tmp_path / "run"
    assert cairn("train", recipe_file, "--run", run, "training.tokens=5 steps", "schedule.horizon=20 steps").status == 0
    largest = max(path.stat().st_size for path in read.list_checkpoints(run)[0].iterdir())

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2))

    resume = ["resume", str(run), "training.tokens=20 steps"]
    died = subprocess.run([sys.executable, "-m", "cairn", *resume], preexec_fn=limit, capture_output=True, text=True)
    assert died.returncode == 2 and died.stderr.strip().splitlines()[-1].startswith("cairn: ") and "Traceback" not in died.stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000005"]
    assert cairn(*resume).status == 0
    assert read.open(run).model_digest == small_run.newest().model_digest


def test_debug_shows_the_traceback(cairn, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cairn", "show", "nowhere", "--debug"])
    from cairn.cli.main import main
    from cairn.errors import NotFoundError

    with pytest.raises(NotFoundError):
        main()
