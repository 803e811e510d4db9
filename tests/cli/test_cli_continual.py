"""The commands for going on, valuing sources and generating, as they are typed."""

import json

import pytest

from cairn.checkpoint.format import read

MEASURE = "callbacks=[{name: evaluate, every: 2 steps, measurements: [{name: held-out, sequences: 8, by_source: true}, {name: next-token, sequences: 8}]}]"


@pytest.fixture(scope="module")
def capitals(corpus_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("capitals") / "capitals.jsonl"
    path.write_text("".join(json.dumps({"text": json.loads(line)["text"].upper()}) + "\n" for line in corpus_file.read_text().splitlines()))
    return path


def test_continue_then_gap(cairn, small_run, capitals, tmp_path):
    data, run = f"caps={capitals}", tmp_path / "c"
    made = cairn("continue", small_run.path, MEASURE, "--data", data, "--tokens", "6 steps", "--replay", "0.25", "--epochs", "2", "--run", run, "--json")
    assert made.status == 0, made.err
    assert read.open(run).step == 26 and made.document["run"] == str(run)
    told = cairn("gap", run, "--old", "walks", "--new", "caps", "--json")
    assert told.status == 0 and told.document["pareto"] == ["c"]
    assert {"depth", "area", "recovery"} <= set(told.document["runs"][0]["gap"])
    assert "forgetting" in cairn("gap", run, "--old", "walks", "--new", "caps").out
    words = ["gap", run, "--old", "walks", "--new", "caps", "--task", "next-token/accuracy"]
    of_task = cairn(*words, "--json").document["runs"][0]["tasks"]["next-token/accuracy"]
    assert of_task is None or of_task["depth"] >= 0
    assert ("not measurable" in cairn(*words).out) == (of_task is None)
    lines = cairn("log", run).out
    assert "schedule.name: cosine -> rewarm" in lines and "fork" in lines


def test_anneal_leaves_a_branch(cairn, small_run, tmp_path):
    answer = cairn("anneal", small_run.checkpoints()[1], "--tokens", "4 steps", "--run", tmp_path / "leaf", "--json")
    assert answer.status == 0 and read.open(tmp_path / "leaf").step == 14
    assert read.open(tmp_path / "leaf").lineage.options["recipe"]["schedule"]["anneal_at"] == "2560 tokens"


def test_ablate_sources(cairn, recipe_file, capitals, corpus_file, tmp_path):
    sources = json.dumps({"plain": {"corpus": str(corpus_file)}, "caps": {"corpus": str(capitals)}})
    assert cairn("train", recipe_file, f"data.sources={sources}", "--run", tmp_path / "r").status == 0
    origin = tmp_path / "r" / "checkpoints" / "step-00000015"
    words = ["ablate-sources", origin, "plain=0.5", "caps=0.5", "--folder", tmp_path / "p", "--orders", "2", "--sequences", "8"]
    answer = cairn(*words, "--json")
    assert answer.status == 0, answer.err
    assert set(answer.document["effects"]) == {"plain", "caps"} and answer.document["effects"]["plain"]["plain"] > 0
    assert "(noise)" in cairn(*words).out
    assert cairn(*words[:2], "plain=much", *words[4:]).err == "cairn: 'plain=much' is not NAME=WEIGHT or train.KEY=VALUE.\n"


def test_generate_a_corpus_and_generations(cairn, recipe_file, small_run, corpus_file, tmp_path):
    written = cairn("data", "generate", small_run.path, "--size", "500", "--longest", "31", "-o", tmp_path / "t", "--json")
    assert written.status == 0 and written.document["checkpoint"] == small_run.newest().digest and written.document["bytes"] >= 500
    few = tmp_path / "few.jsonl"
    few.write_text("".join(corpus_file.read_text().splitlines(keepends=True)[:40]))
    words = ["generations", recipe_file, "--folder", tmp_path / "g", f"data.sources.walks.corpus={few}", "training.tokens=4 steps"]
    answer = cairn(*words, "--policy", "replace", "--count", "2", "--longest", "31", "--json")
    assert answer.status == 0, answer.err
    first, second = answer.document
    assert first["composition"] == {"walks": 1.0} and second["composition"] == {"generation-1": 1.0} and first["diversity"]["distinct_4"] > 0
    assert 0 <= first["diversity"]["self_bleu"] <= 1 and 0 <= first["diversity"]["duplicates"] <= 1 and 0 <= second["tail_mass"] <= 1
    assert all(title in cairn(*words, "--policy", "replace", "--count", "2", "--longest", "31").out for title in ("self-BLEU", "duplicates", "tail mass"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["continue", "RUN", "--tokens", "5 steps"], "Name at least one corpus"),
        (["continue", "RUN", "--tokens", "5 steps", "--run", "OUT"], "Name at least one corpus"),
        (["continue", "RUN", "--data", "caps=", "--tokens", "5 steps", "--run", "OUT"], "--data is written NAME=CORPUS or as the path of a text, not 'caps='"),
        (["continue", "RUN", "--data", "caps", "--tokens", "5 steps", "--run", "OUT"], "There is no corpus 'caps'"),
        (["anneal", "RUN", "--run", "OUT"], "the length of the branch with --tokens"),
        (["gap", "RUN", "--old", "walks", "--new", "caps"], "has no figure 'held-out/walks/loss'"),
        (["data", "generate", "RUN", "--longest", "100000", "-o", "OUT"], "ask for at most"),
    ],
)
def test_what_is_missing_is_one_sentence(cairn, small_run, tmp_path, words, sentence):
    places = {"RUN": small_run.path, "OUT": tmp_path / "out"}
    answer = cairn(*(places.get(word, word) for word in words))
    assert answer.status == 2 and sentence in answer.err and answer.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
