"""One bad folder never breaks another's page or the index: it is passed over, and named."""

import itertools
import json
import math
import os
import re
import shutil
import time

import pytest

from cairn.errors import DamagedError, InputError, Notice
from cairn.evaluation import results
from cairn.evaluation.measure import stored_rows
from cairn.registry import descent
from cairn.registry.index import Index
from cairn.registry.query import find

HUGE = '{"tokens": 5, "loss": 1e308}\n{"tokens": 9, "loss": -1e308}\n'
BAD_SCORES = {
    "a list for an error": {"stderr": [1]},
    "words for an error": {"stderr": "abc"},
    "no number": {"value": "abc"},
    "not finite": {"value": math.nan},
    "infinite": {"value": math.inf},
    "beyond every table": {"value": 10**400},
    "words for a count": {"n": "many"},
    "a boolean for a count": {"n": True},
    "a mapping for a task": {"task": {}},
    "a strange key": {"trust": 1},
    "a list for chance": {"chance": [0.5]},
}
BAD_FILES = {
    "no JSON": "{",
    "a list": "[]",
    "a number": "3",
    "deep": "[" * 100_000,
    "no scores": '{"model_digest": "x"}',
    "scores that are none": '{"model_digest": "x", "protocol_digest": "y", "protocol": {}, "scores": [3]}',
    "no protocol": '{"model_digest": "x", "protocol_digest": "y", "protocol": null, "scores": []}',
    "a lone surrogate": '{"model_digest": "\\ud800", "protocol_digest": "y", "protocol": {}, "scores": []}',
}


@pytest.fixture
def tree(zoo, tmp_path):
    shutil.copytree(zoo, tmp_path / "zoo")
    return tmp_path / "zoo"


def spoiled(tree, change) -> str:
    """The name of a result file of the run that `change` has altered."""
    file = next(path for path in sorted((tree / "run/results").glob("*.json")) if not path.name.endswith(".items.json"))
    document = json.loads(file.read_text())
    text = change(document)
    file.write_text(text if isinstance(text, str) else json.dumps(document))
    return file.name


CHANGES = {
    **{name: (lambda document, values=values: document["scores"][0].update(values)) for name, values in BAD_SCORES.items()},
    **{name: (lambda document, text=text: text) for name, text in BAD_FILES.items()},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_bad_result_is_passed_over_and_named(tree, tmp_path, name):
    with Index(tmp_path / "i.sqlite") as index:
        index.add(tree)
        whole = index.rows("SELECT count(*) AS n FROM results")[0]["n"]
        file = spoiled(tree, CHANGES[name])
        report = index.refresh()
        assert [problem for problem in report.problems if file in problem and "passed over" in problem], report.problems
        assert 0 < index.rows("SELECT count(*) AS n FROM results")[0]["n"] < whole and report.checkpoints == 9
        assert len(index.refresh().problems) == len(report.problems), "still named at the next look"
        (tree / "run/results" / file).unlink()
        assert not [problem for problem in index.refresh().problems if file in problem]
    with pytest.raises(DamagedError):
        path = tree / "run/results" / file
        path.write_text("{")
        results.read(path)


def test_a_bad_result_is_named_by_what_reads_results(tree):
    file = spoiled(tree, lambda document: document["scores"][0].update(stderr="abc"))
    with pytest.warns(Notice, match=file):
        rows = stored_rows(tree / "run")
    assert rows


def test_folders_that_cannot_be_understood_are_named_and_the_rest_is_indexed(tree, tmp_path):
    with Index(tmp_path / "i.sqlite") as index:
        sound = index.add(tree).checkpoints
        strange = os.fsdecode(os.fsencode(str(tree)) + b"/\xff\xfe")
        shutil.copytree(tree / "bf16", strange)
        for name, text in {"list": "[]", "text": '"x"', "digits": '{"model_type": "llama", "hidden_size": 1e999}', "null": "null"}.items():
            shutil.copytree(tree / "bf16", tree / name)
            (tree / name / "config.json").write_text(text)
            for file in ("manifest.json", "lineage.json"):
                (tree / name / file).unlink(missing_ok=True)
        report = index.refresh()
        assert report.checkpoints >= sound and any("\\udcff" in problem for problem in report.problems)
        assert index.refresh().opened == 0, "what is known to be bad is not opened again"
        assert find(index, "run:run").total == 4


def test_a_run_with_a_bad_recipe_or_bad_rows_does_not_end_the_index(tree, tmp_path):
    (tree / "run/recipe.yaml").write_text("[" * 3000)
    (tree / "branch/metrics.jsonl").write_text(
        '{"step": 1e400, "tokens": [], "loss": "x"}\n[]\n' + '{"tokens": 5, "loss": 1e308}\n{"tokens": 9, "loss": -1e308}\n'
    )
    with Index(tmp_path / "i.sqlite") as index:
        assert index.add(tree).runs == 2
        site = client(index)
        for row in index.rows("SELECT key FROM runs"):
            assert site.get(f"/run/{row['key']}").status_code == 200
        assert site.get("/runs").status_code == site.get("/").status_code == 200


def client(index, **options):
    pytest.importorskip("starlette")
    from starlette.testclient import TestClient

    from cairn.registry.web.app import create_app

    return TestClient(create_app(index.path, **options), base_url="http://127.0.0.1:8420", follow_redirects=False)


QUERIES = [
    "%00",
    "%ed%a0%80",
    "step>=1e400",
    "step>=" + "9" * 400,
    "a+" * 2000,
    "%22",
    "*",
    "'; DROP TABLE runs",
    "name:",
    "AND OR NOT",
    "held-out:loss<nan",
    "%7f",
    "(" * 50,
]


@pytest.mark.parametrize("query", QUERIES)
def test_an_odd_query_is_answered_and_never_by_500(index, query):
    answer = client(index).get(f"/checkpoints?q={query}")
    assert answer.status_code in (200, 400), answer.text
    assert client(index).get("/").status_code == 200


@pytest.mark.parametrize("address", ["/run/%00", "/checkpoint/%ff", "/lineage/x", "/compare?c=%00&c=1", "/compare?c=a", "/compare?" + "c=%ed%a0%80&c=b"])
def test_an_odd_address_is_answered_and_never_by_500(index, address):
    assert client(index).get(address).status_code in (400, 404)


def test_an_unprintable_query_is_refused_in_one_sentence(index):
    for query in ("a\x00b", "\ud800", "x " * 60):
        with pytest.raises(InputError):
            find(index, query)


def test_a_page_of_a_checkpoint_says_what_of_it_is_damaged(tree, tmp_path):
    from cairn.registry import statements

    with Index(tmp_path / "i.sqlite") as index:
        index.add(tree)
        from cairn.registry.web.pages import open_inside

        key = find(index, "run:run step=20").rows[0]["key"]
        statements.keep(open_inside(index, key), "portability", {})
        kept = next((tree / "run/statements").glob("*.portability.json"))
        kept.write_text("{")
        answer = client(index).get(f"/checkpoint/{key}")
        assert answer.status_code == 200 and kept.name in answer.text


def test_a_look_that_fails_is_said_on_every_page_and_the_next_one_is_made(index, monkeypatch):
    import threading

    from cairn.registry.web.app import Freshness
    from cairn.registry.web.server import _keep_fresh

    freshness, stop, looked = Freshness(), threading.Event(), []

    def fail(self, *_):
        looked.append(1)
        if len(looked) == 3:
            stop.set()
            return None
        raise RuntimeError("a folder of thorns")

    monkeypatch.setattr(Index, "refresh", fail)
    keeper = threading.Thread(target=_keep_fresh, args=(index.path, 0.01, stop, freshness))
    keeper.start()
    while len(looked) < 2:
        time.sleep(0.01)
    keeper.join(10)
    assert len(looked) == 3 and freshness.problem == "", "a look that goes well ends the complaint"
    freshness.problem = "RuntimeError: a folder of thorns"
    site = client(index, freshness=freshness)
    assert all("a folder of thorns" in site.get(address).text for address in ("/", "/runs", "/no-such-page"))


def test_steps_of_a_run_between_which_nothing_begins_are_one_box():
    names = [f"s{i}" for i in range(10)]
    edges = [(child, parent) for parent, child in itertools.pairwise(names)] + [("fork", "s6")]
    run = {**dict.fromkeys(names, "run"), "fork": "branch"}
    assert descent.stretches(edges, run, keep="s9") == [["s1", "s2", "s3", "s4", "s5"]], "the fork begins at s6; s8 stands next to s9"
    assert descent.stretches(edges, run, keep="fork") == [["s1", "s2", "s3", "s4", "s5"], ["s7", "s8"]]


def test_a_lineage_opens_at_the_checkpoint_itself_and_folds_a_long_run(index, monkeypatch):
    from cairn.registry.web import pages

    key = find(index, "run:run step=20").rows[0]["key"]
    text = client(index).get(f"/lineage/{key}").text
    assert text.count(' here"') == 1 and re.search(r'class="node \w+ here"', text)
    script = client(index).get("/static/cairn.js").text
    assert '.lineage .here")?.scrollIntoView' in script
    here = index.row("SELECT digest FROM checkpoints WHERE key = ?", (key,))["digest"]
    chain = [f"{i:064x}" for i in range(300)] + [here]
    monkeypatch.setattr(Index, "edges", lambda self: [(child, parent) for parent, child in itertools.pairwise(chain)])
    real = pages._at
    row = {"run": "r", "act": "run: train", "created": None}
    monkeypatch.setattr(pages, "_at", lambda i, d: real(i, d) or row | {"title": f"r/step-{int(d, 16)}", "step": int(d, 16), "key": d[:16]})
    found = pages.lineage(index, key)
    assert found["shown"] <= 4 and found["ancestors"] == 300 and "steps 1 to 298" in found["graph"]
