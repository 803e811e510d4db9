"""The index: a copy of what lies in the directories, refreshed without opening what has not changed, searched by words and conditions."""

import json
import os
import shutil
import sqlite3

import pytest

import cairn
from cairn.checkpoint.format import read
from cairn.errors import InputError, NotFoundError
from cairn.registry.index import Index
from cairn.registry.query import find
from cairn.registry.statements import claim, describe


def titles(index, query):
    return {row["title"] for row in find(index, query).rows}


def test_everything_under_a_folder_is_found_and_nothing_is_opened_twice(zoo, tmp_path):
    with Index(tmp_path / "i.sqlite") as index:
        first, again = index.add(zoo), index.refresh()
        assert (first.runs, first.checkpoints, first.opened, first.problems) == (2, 9, 9, ())
        assert (again.opened, again.forgotten, again.checkpoints) == (0, 0, 9)
        newest = read.open(zoo / "run")
        row = index.row("SELECT * FROM checkpoints WHERE path = ?", (str(newest.path.resolve()),))
        assert (row["digest"], row["model_digest"], row["step"], row["resumable"]) == (newest.digest, newest.model_digest, 20, 1)
        assert row["parameters"] == sum(t.load().numel() for t in newest.tensors.values())


def test_stages_are_called_by_their_run_too(staged_run, tmp_path):
    with Index(tmp_path / "index.sqlite") as index:
        index.add(staged_run.path)
        names = {row["name"] for row in index.rows("SELECT name FROM runs")}
        assert names == {f"{staged_run.path.name}/{stage}" for stage in ("1-web", "2-anneal-42", "3-anneal-666")}
        found = titles(index, "act:average")
        assert found == {f"{staged_run.path.name}/4-soup"}
        assert f"{staged_run.path.name}/1-web/step-00000012" in titles(index, "")


def test_facts_say_how_they_are_known(index, zoo):
    key = index.row("SELECT key FROM checkpoints WHERE title = 'run/step-00000020'")["key"]
    facts = index.facts(key)
    assert facts["parameters"].how == "measured" and facts["step"].how == "derived" and facts["data"].how == "derived"
    assert "license" not in facts
    files = {row["name"]: row for row in index.rows("SELECT * FROM files WHERE key = ?", (key,))}
    assert files["model.safetensors"]["bytes"] == (zoo / "run/checkpoints/step-00000020/model.safetensors").stat().st_size


def test_what_is_said_changed_or_removed_shows_at_the_next_refresh(zoo, tmp_path):
    shutil.copytree(zoo / "run", tmp_path / "zoo" / "run")
    with Index(tmp_path / "i.sqlite") as index:
        index.add(tmp_path / "zoo")
        describe(tmp_path / "zoo/run", ["license=Apache-2.0"])
        describe(tmp_path / "zoo/run/checkpoints/step-00000005", ["license=MIT", "name=early"])
        claim(tmp_path / "zoo/run", "accuracy", 0.5, n=10)
        assert index.refresh().opened == 4
        assert titles(index, "license:apache-2.0") == {f"run/step-{step:08d}" for step in (10, 15, 20)}
        assert titles(index, "license:mit") == {"early"} and titles(index, "early") == {"early"}
        key = find(index, "early").rows[0]["key"]
        assert [c.value for c in index.claims(key)] == [0.5] and index.facts(key)["license"].how == "stated"
        cairn.evaluate(tmp_path / "zoo/run", [{"name": "held-out", "sequences": 4}])
        assert index.refresh().opened == 0 and len(index.results(key)) == 4
        shutil.rmtree(tmp_path / "zoo/run/checkpoints/step-00000005")
        report = index.refresh()
        assert (report.forgotten, report.checkpoints) == (1, 3) and not titles(index, "early")
        before = index.rows("SELECT * FROM checkpoints ORDER BY key"), index.rows("SELECT * FROM results ORDER BY 1, 2, 3, 4")
        assert index.rebuild().opened == 3
        assert before == (index.rows("SELECT * FROM checkpoints ORDER BY key"), index.rows("SELECT * FROM results ORDER BY 1, 2, 3, 4"))


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("step>=15 run:run", {"run/step-00000015", "run/step-00000020"}),
        ("act:slerp", {"mixed"}),
        ("aver", {"average"}),
        ("tokens<2k", {"run/step-00000005"}),
        ("walks step=20 run:branch", {"branch/step-00000020"}),
        ("held-out:loss<100 step=20", {"run/step-00000020"}),
        ("bytes>1GiB", set()),
        ('"quoted" or (', set()),
    ],
)
def test_searching(index, query, expected):
    assert titles(index, query) == expected


def test_a_search_that_finds_nothing_says_which_part_left_out_how_many(index):
    found = find(index, "family:llama license:mit step>=15")
    # Of nine, none has a license; four have a step of at least 15.
    assert found.total == 0 and found.left_out == {"family:llama": 0, "license:mit": 9, "step>=15": 5}


@pytest.mark.parametrize(("query", "sentence"), [("famly:llama", "'family'"), ("stp>3", "'step'"), ("step>many", "not a number"), ("a:b>x", "not a number")])
def test_a_search_that_asks_for_what_is_not_there_is_told_so(index, query, sentence):
    with pytest.raises(InputError, match=sentence):
        find(index, query)


def test_unsound_directories_are_listed_and_the_rest_is_indexed(zoo, tmp_path):
    shutil.copytree(zoo / "run", tmp_path / "zoo" / "run")
    first, second, third, _ = sorted((tmp_path / "zoo/run/checkpoints").iterdir())
    (first / "manifest.json").write_text("{}")
    (second / "config.json").unlink()
    (third / "trainer.json").write_text("[]" + " " * ((third / "trainer.json").stat().st_size - 2))
    (third.parent / "step-00000099").symlink_to(zoo / "average")
    with Index(tmp_path / "i.sqlite") as index:
        report = index.add(tmp_path / "zoo")
    assert report.checkpoints == 1 and len(report.problems) == 3
    assert "is not sound" in report.problems[0] and "config.json: is missing" in report.problems[1] and "damaged" in report.problems[2]


def test_a_descent_that_leads_back_to_itself_is_refused(zoo, tmp_path):
    """The digest of a state does not cover lineage.json, so a forged one could name its own child; the manifest's entry is forged along."""
    from cairn.checkpoint.format.manifest import Manifest, entry_of

    shutil.copytree(zoo / "average", tmp_path / "zoo/average")
    shutil.copytree(zoo / "bf16", tmp_path / "zoo/bf16")
    child, forged = read.open(tmp_path / "zoo/bf16"), tmp_path / "zoo/average"
    lineage = json.loads((forged / "lineage.json").read_text()) | {"parents": [{"digest": child.digest, "path": "bf16", "step": None}]}
    (forged / "lineage.json").write_text(json.dumps(lineage))
    files = dict(Manifest.load(forged).files) | {"lineage.json": entry_of((forged / "lineage.json").read_bytes())}
    (forged / "manifest.json").write_bytes(Manifest.of(files).dump())
    with Index(tmp_path / "i.sqlite") as index:
        report = index.add(tmp_path / "zoo")
        assert report.checkpoints == 2 and len(report.problems) == 2 and all("leads back to itself" in problem for problem in report.problems)
        assert index.edges() == []


def test_folders_inside_each_other_are_one(zoo, tmp_path):
    with Index(tmp_path / "i.sqlite") as index:
        index.add(zoo / "run")
        index.add(zoo)
        assert index.roots() == [zoo.resolve()]
        index.add(zoo / "branch")
        assert index.roots() == [zoo.resolve()] and index.refresh().checkpoints == 9
        index.forget(zoo.resolve())
        assert index.refresh().checkpoints == 0 and index.rows("SELECT * FROM results") == []


def test_what_is_no_folder_or_no_index_is_refused(tmp_path):
    (tmp_path / "file.sqlite").write_text("these are words, not tables, and quite a few of them" * 50)
    with pytest.raises(InputError, match="not an index"):
        Index(tmp_path / "file.sqlite")
    with pytest.raises(NotFoundError, match="no index"):
        Index(tmp_path / "i.sqlite", readonly=True)
    with Index(tmp_path / "i.sqlite") as index, pytest.raises(NotFoundError, match="no folder"):
        index.add(tmp_path / "nowhere")
    other = sqlite3.connect(tmp_path / "i.sqlite")
    other.execute("PRAGMA user_version = 99")
    other.close()
    with Index(tmp_path / "i.sqlite") as index:
        assert index.roots() == []


def test_statements_are_checked_before_they_are_kept(zoo, tmp_path):
    shutil.copytree(zoo / "average", tmp_path / "average")
    with pytest.raises(InputError, match="'license'"):
        describe(tmp_path / "average", ["licence=mit"])
    with pytest.raises(InputError, match="nan"):
        claim(tmp_path / "average", "accuracy", float("nan"))
    assert not (tmp_path / "statements").exists()
    assert describe(tmp_path / "average", ["license=mit", "version=1.0"]).version == "1.0"
    assert describe(tmp_path / "average", ["license=null"]).license is None
    # A checkpoint itself never changes.
    assert {p.name for p in (tmp_path / "average").iterdir()} == {p.name for p in (zoo / "average").iterdir()}
    assert not [name for name in os.listdir(tmp_path / "statements") if name.endswith(".tmp")]


HOSTILE = {
    "config.json": '{"model_type": ["llama"], "architectures": [{"a": 1}], "vocab_size": 1e400, "hidden_size": "' + "x" * 9 + '"}',
    "trainer.json": '{"step": 123456789012345678901234567890, "tokens": 1}',
    "generation_config.json": "[" * 20_000,
    "README.md": "---\nlicense: [mit, {a: b}]\nlanguage: 2026-01-01\nmodel-index: {a: &x [1], b: *x}\n---\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_never_stop_the_index(zoo, tmp_path, name):
    from cairn.checkpoint.format.manifest import Manifest, entry_of

    shutil.copytree(zoo / "run", tmp_path / "zoo/run")
    place = tmp_path / "zoo/run/checkpoints/step-00000005"
    (place / name).write_text(HOSTILE[name])
    (place / "manifest.json").write_bytes(Manifest.of({p.name: entry_of(p.read_bytes()) for p in place.iterdir() if p.name != "manifest.json"}).dump())
    (tmp_path / "zoo/run/recipe.yaml").write_text("a: &a [1, 2]\nb: [*a, *a]\n? [1, 2]\n: 3\n")
    (tmp_path / "zoo/run/metrics.jsonl").write_text('{"step": [1], "tokens": 1e400, "loss": "low"}\n')
    (tmp_path / "zoo/run/results/0000000000000000-0000000000000000.json").write_text(
        '{"scores": [{"task": [], "metric": {}, "value": "x", "stderr": 0, "n": 1}]}'
    )
    with Index(tmp_path / "i.sqlite") as index:
        report = index.add(tmp_path / "zoo")
        of_results = [problem for problem in report.problems if "0000000000000000.json" in problem]
        assert len(of_results) == 1 and report.checkpoints + len(report.problems) == 5 and report.checkpoints >= 3 and report.runs == 1
        assert index.rows("SELECT step, loss FROM runs") == [{"step": None, "loss": None}]
        assert len(find(index, "step>=10").rows) == 3
