"""A recipe of several stages on the command line: what it will do, doing it, and what is left behind."""

import yaml

from cairn.checkpoint.format import read


def test_a_dry_run_tells_every_stage(cairn, tmp_path, staged):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(staged))
    told = cairn("train", tmp_path / "r.yaml", "--dry-run", "--json").document
    assert [row["act"] for row in told["stages"]] == ["run: train", "run: fork", "run: fork", "operation: average"]
    assert told["first"]["steps"] == 12 and told["stages"][2]["seed"] == 666
    lines = cairn("train", tmp_path / "r.yaml", "--dry-run").out.splitlines()
    assert {"web", "anneal-42", "anneal-666", "soup"} <= {line.split(" ")[0] for line in lines}


def test_train_resume_show_and_log(cairn, tmp_path, staged, staged_run):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(staged))
    short = tmp_path / "short"
    told = cairn("train", tmp_path / "r.yaml", "--run", short, "--json").document
    assert [row["state"] for row in told["stages"]] == ["finished"] * 4 and told["digest"] == staged_run.newest().digest
    resumed = cairn("resume", short, "--json").document
    assert resumed["digest"] == told["digest"]
    shown = cairn("show", short, "--json").document
    assert shown["stage"] == "soup" and [row["stage"] for row in shown["stages"]] == ["web", "anneal-42", "anneal-666", "soup"]
    assert "anneal-666" in cairn("show", short).out
    assert cairn("show", short / "stages" / "2-anneal-42", "--json").document["stage"] == "anneal-42"
    descent = cairn("log", short).out
    assert "operation: average (soup)" in descent and "run: fork (anneal-42)" in descent and "changed stage: web -> anneal-666" in descent
    assert cairn("verify", short, "--json").document["sound"]


def test_bad_stages_are_one_sentence(cairn, tmp_path, staged, staged_run):
    broken = staged | {"stages": [{"name": "a"}, {"name": "b", "from": "a", "set": {"training.tokns": 3}}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(broken))
    for arguments in (("--run", tmp_path / "x"), ("--dry-run",)):
        answer = cairn("train", tmp_path / "r.yaml", *arguments)
        assert answer.status == 2 and answer.err.startswith("cairn: stage 'b': unknown key 'training.tokns'. Did you mean 'tokens'?")
    assert not (tmp_path / "x").exists()
    answer = cairn("resume", staged_run.path, "seed=4")
    assert answer.status == 2 and "several stages" in answer.err and "cairn fork" in answer.err


def test_looking_at_stages_does_not_load_torch(staged_run):
    from tests.cli.test_cli_startup import HEAVY, loaded, run

    for command in ("show", "log", "verify"):
        assert not loaded(run(command, staged_run.path)) & HEAVY
    assert len(read.list_stages(staged_run.path)) == 4


def test_stability_of_every_stage(cairn, staged_run, small_run, tmp_path):
    document = cairn("stability", staged_run.path, small_run.path, "--window", 5, "--signals", "--plot", tmp_path / "s.png", "--json").document
    assert [report["steps"] for report in document] == [12, 8, 8, 20] and len(document[3]["signals"]) == 4
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
    table = cairn("stability", small_run.path).out
    assert "gradient growth" in table and "largest_logit" not in table
