"""Every command: what it prints, as one JSON document when asked, and how it leaves."""

import json
import signal
import subprocess
import sys
import time

import pytest

from cairn.checkpoint.format import read
from cairn.training.run import Run

COMMANDS = [
    "demo",
    "train",
    "resume",
    "fork",
    "continue",
    "anneal",
    "gap",
    "generate",
    "evaluate",
    "stability",
    "show",
    "log",
    "index",
    "search",
    "replay",
    "describe",
    "claim",
    "card",
    "explain",
    "sign",
    "trends",
    "doctor",
    "serve",
    "diff",
    "verify",
    "audit",
    "average",
    "merge",
    "ablate",
    "ablate-sources",
    "generations",
    "study",
    "data",
    "catalog",
    "export",
    "import",
    "keeper",
    "survival",
]


def test_help_names_every_command(cairn):
    answer = cairn("--help")
    assert answer.status == 0
    for command in COMMANDS:
        assert f"│ {command} " in answer.out


@pytest.mark.parametrize(
    "command",
    [
        *COMMANDS,
        *("data list", "data fetch", "data generate", "data prepare", "keeper status", "keeper persist", "keeper stop"),
        *("audit leakage", "audit formats", "audit flips", "audit stability", "audit claims", "audit risks", "audit portability"),
    ],
)
def test_every_command_has_help_and_all_that_answer_have_json(cairn, command):
    answer = cairn(*command.split(), "--help")
    assert answer.status == 0
    assert command in ("data", "audit", "keeper") or "--json" in answer.out


def test_without_a_command_help_is_shown_and_the_status_is_that_of_bad_input(cairn):
    assert cairn().status == 2


def test_version(cairn):
    from cairn import __version__

    assert cairn("--version").out.strip() == __version__


def test_train_fork_and_resume(cairn, tmp_path, recipe_file, small_run):
    half = cairn("train", recipe_file, "training.tokens=10 steps", "schedule.horizon=20 steps", "--run", tmp_path / "run", "--json").document
    assert half["step"] == 10 and half["tokens"] == 2560 and half["loss"] > 0
    whole = cairn("resume", tmp_path / "run", "training.tokens=20 steps", "--json").document
    assert whole["step"] == 20 and read.open(whole["checkpoint"]).model_digest == small_run.newest().model_digest
    branch = cairn(
        "fork", tmp_path / "run", "training.tokens=22 steps", "optimizer.lr=1e-4", "--fresh", "optimizer", "--run", tmp_path / "branch", "--json"
    ).document
    assert branch["step"] == 22
    steps = cairn("log", tmp_path / "branch", "--json").document
    assert any("optimizer.lr: 0.003 -> 0.0001" in line for entry in steps for line in entry["changed"])
    assert any("optimizer state: kept -> fresh" in line for entry in steps for line in entry["changed"])
    assert whole["digest"] in [entry["digest"] for entry in steps]


def test_dry_run_costs_nothing(cairn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figures = cairn("train", "dmas-1.7b", "--dry-run", "--gpu", "rtxa6000", "--gpus", "2", "--json").document
    assert figures["parameters"] == 1_716_144_128 and figures["tokens"] == 19_073 * 524_288
    assert figures["gpu"].startswith("2 x rtxa6000")
    assert cairn("train", "demo", "--dry-run").out.count("\n") == len(figures)
    assert not list(tmp_path.iterdir())


def test_generate_is_repeatable(cairn, small_run):
    arguments = ["generate", small_run.path, "--prompt", "the stone ", "--new-tokens", "8", "--seed", "3"]
    document = cairn(*arguments, "--json").document
    assert document["prompt"] == "the stone " and document["text"]
    assert cairn(*arguments).out == "the stone " + document["text"] + "\n"


def test_evaluate_prints_the_tidy_table(cairn, tmp_path, small_run):
    answer = cairn("evaluate", small_run.path, "sequences=8", "--plot", tmp_path / "curve.png", "--json")
    assert {row["checkpoint"] for row in answer.document} == {path.name for path in small_run.checkpoints()}
    assert {row["metric"] for row in answer.document} == {"loss", "bits_per_byte"}
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    again = cairn("evaluate", small_run.path, "sequences=8", "--json")
    assert again.document == answer.document and again.err == "", "measured twice"


def test_show_log_diff_verify_average_merge_and_export(cairn, tmp_path, small_run):
    first, *_, last = small_run.checkpoints()
    shown = cairn("show", small_run.path, "--tensors", "--json").document
    assert shown["step"] == 20 and shown["resumable"] and len(shown["tensors"]) == len(read.open(last).tensors)
    assert cairn("diff", first, last, "--json").document["steps"] == [5, 20]
    assert cairn("diff", first, last).status == 0
    verified = cairn("verify", last, "--json").document
    assert verified["sound"] and verified["digest"] == read.open(last).digest
    average = cairn("average", small_run.path, "--last", 2, "-o", tmp_path / "average", "--json").document
    merged = cairn("merge", "linear", *small_run.checkpoints()[-2:], "weights=[0.5, 0.5]", "-o", tmp_path / "merged", "--json").document
    assert average["parents"] == merged["parents"]
    exported = cairn("export", tmp_path / "average", "--dtype", "bfloat16", "-o", tmp_path / "export", "--json").document
    assert exported["parents"] == [average["digest"]]
    assert cairn("show", exported["path"], "--json").document["dtypes"].keys() == {"BF16"}
    for command in ("show", "log", "verify"):
        assert cairn(command, tmp_path / "export").status == 0
    assert "average" in cairn("log", tmp_path / "export").out


def test_catalog_and_lists(cairn):
    operations = cairn("catalog", "operation", "--json").document
    assert {"average", "linear"} <= {row["name"] for row in operations} and all(row["papers"] for row in operations)
    assert cairn("catalog").status == 0
    assert {row["card"] for row in cairn("study", "--json").document} >= {1}
    sets = cairn("data", "list", "--json").document
    assert all(row["license"] and row["origin"] for row in sets)


def test_data_prepare(cairn, tmp_path, corpus_file):
    figures = cairn("data", "prepare", corpus_file, "-o", tmp_path / "store", "--held-out", "0.1", "--json").document
    assert figures["train"]["documents"] + figures["held_out"]["documents"] == 300


def test_a_call_of_the_functions_by_their_names(small_run, tmp_path):
    """The package's functions are those of the commands, also where a room has the same name."""
    import cairn

    assert cairn.open(small_run.path).step == 20 and cairn.show(small_run.path)["step"] == 20
    import cairn.merging.methods.average
    import cairn.training.recipe

    assert cairn.average([small_run.path], tmp_path / "a", last=2).digest
    with pytest.raises(cairn.errors.InputError, match="not empty"):
        cairn.train("demo", small_run.path)
    assert cairn.training.recipe.shipped()
    with pytest.raises(AttributeError):
        cairn.nothing  # noqa: B018


def test_control_c_saves_and_leaves_with_130(tmp_path, recipe_file):
    command = [sys.executable, "-m", "cairn", "train", recipe_file, "training.tokens=100k steps", "checkpoint.every=1M steps", "--run", tmp_path / "run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 120
        while not Run(tmp_path / "run").metrics() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    rows = Run(tmp_path / "run").metrics()
    assert Run(tmp_path / "run").newest().step == rows[-1]["step"] > 0


def test_json_is_alone_on_stdout_in_a_process_of_its_own(small_run):
    done = subprocess.run([sys.executable, "-m", "cairn", "show", small_run.path, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["step"] == 20 and done.stderr == ""


def test_a_method_is_found_by_its_name_alone(cairn):
    shown = cairn("catalog", "cosine")
    assert shown.status == 0 and "schedule cosine:" in shown.out and "warmup" in shown.out and "arXiv:1608.03983" in shown.out
    (row,) = cairn("catalog", "cosine", "--json").document
    assert {option["name"]: option["default"] for option in row["options"]}["horizon"] == "100%"
    assert [each["name"] for each in cairn("catalog", "optimizer", "--json").document] == ["adamw"]
    refused = cairn("catalog", "cosin")
    assert refused.status == 2 and refused.err == "cairn: There is no kind and no method 'cosin'. Did you mean 'cosine'?\n"
