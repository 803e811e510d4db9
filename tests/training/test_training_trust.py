"""What one's own runs name is opened; what a stranger's run names is not, unless it is asked for."""

import json
import shutil

import pytest

import cairn
from cairn.checkpoint.format import place, trust
from cairn.checkpoint.memory import attend, link
from cairn.errors import InputError
from cairn.training import sources
from cairn.training.run import fork, resume, train


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Another user: what was named here is not known."""

    def begin():
        monkeypatch.setenv("CAIRN_STATE", str(tmp_path / "another"))
        monkeypatch.setattr(trust, "_here", set())
        monkeypatch.setattr(trust, "_everything", False)

    return begin


@pytest.fixture
def run(small_recipe, tmp_path):
    """A run of a user of whom nothing was known."""
    short = {**small_recipe["training"], "tokens": "2 steps", "batch": 64}
    return train({**small_recipe, "training": short, "checkpoint": {"every": "1 steps"}}, tmp_path / "run")


def measured(run):
    return cairn.evaluate(run.newest(), [{"name": "held-out", "sequences": 1}], store=False)


def test_data_that_the_user_named_are_known_in_later_processes_and_other_places(run, tmp_path, monkeypatch):
    monkeypatch.setattr(trust, "_here", set())  # a later process
    moved = shutil.copytree(run.path, tmp_path / "moved")
    assert measured(run)[0].value == cairn.evaluate(moved / "checkpoints" / "step-00000002", [{"name": "held-out", "sequences": 1}], store=False)[0].value
    assert resume(moved, ["training.tokens=3 steps"]).newest().step == 3


def test_data_of_a_stranger_are_not_opened_by_any_reader(run, elsewhere, tmp_path, monkeypatch):
    elsewhere()
    monkeypatch.setattr(sources, "open_data", lambda *_, **__: pytest.fail("the data were opened"))
    newest = run.newest()
    readers = [
        lambda: measured(run),
        lambda: fork(newest, tmp_path / "fork", ["training.tokens=3 steps"]),
        lambda: cairn.stability(run.path, signals=True),
        lambda: cairn.replay(newest, store=False),
        lambda: cairn.grow("ligo", newest, tmp_path / "grown", {"factor": 2, "steps": 1}),
        lambda: cairn.merge("linear", [newest, newest], tmp_path / "merged", objective=_objective),
    ]
    for number, reads in enumerate(readers):
        with pytest.raises(InputError, match=r"walks\.jsonl, which are not opened because a file says so; --follow opens them"):
            reads()
            pytest.fail(f"reader {number} opened them")
    assert not (tmp_path / "fork" / "checkpoints").exists() and not (tmp_path / "merged").exists()


def test_a_run_goes_on_with_its_files_on_a_new_machine_and_nothing_else_opens_them(run, elsewhere):
    elsewhere()
    assert resume(run.path, ["training.tokens=3 steps"]).newest().step == 3
    elsewhere()
    with pytest.raises(InputError, match="--follow"):
        measured(run)


def test_a_resume_does_not_go_to_a_network_for_data(small_recipe, elsewhere):
    from cairn.training.recipe import Recipe

    elsewhere()
    recipe = Recipe.parse({**small_recipe, "data": {**small_recipe["data"], "sources": {"walks": {"corpus": {"name": "hf", "path": "someone/walks"}}}}})
    sources.go_on_reading(recipe.data)
    with pytest.raises(InputError, match="--follow"):
        sources.refuse_unnamed(recipe.data)


def _objective(reference):
    from cairn.merging.target import objective

    return objective("held-out", reference, select={"sequences": 1}, report=None)


def test_they_are_opened_where_the_user_names_or_follows_them(run, elsewhere, small_recipe, tmp_path):
    elsewhere()
    corpus = small_recipe["data"]["sources"]["walks"]["corpus"]
    named = [f"data.sources={json.dumps({'walks': {'corpus': corpus}, 'docs': {'corpus': corpus + ''}})}"]
    with pytest.raises(InputError, match="--follow"):
        measured(run)
    place.permit()
    assert measured(run)
    elsewhere()
    with pytest.raises(InputError, match="--follow"):  # words of the checkpoint's own recipe, said again, name nothing new
        fork(run.newest(), tmp_path / "same", [*named, "training.tokens=3 steps"])
    own = shutil.copy(corpus, tmp_path / "mine.jsonl")
    forked = fork(run.newest(), tmp_path / "fork", [f"data.sources={json.dumps({'mine': {'corpus': str(own)}})}", "training.tokens=3 steps"])
    assert measured(forked)


@pytest.mark.parametrize(
    "corpus", ["python-docs", {"name": "python-source", "part": "standard-library"}, "tiny-shakespeare", {"name": "dataset", "dataset": "x"}]
)
def test_named_data_sets_and_texts_of_this_python_are_the_same_everywhere(corpus):
    assert sources._place_of(corpus) is None


def test_a_store_that_was_named_is_known_and_one_beside_it_is_not(elsewhere, tmp_path):
    elsewhere()
    place.permit("s3://bucket/run", keep=True)
    trust._here.clear()
    assert place.permitted("s3://bucket/run") and place.permitted("s3://bucket/run/checkpoints/")
    assert not any(map(place.permitted, ("s3://bucket", "s3://bucket/running", "s3://bucket/run/../other", "http://bucket/run", "s3://", "")))


def test_a_resume_does_not_write_where_a_strangers_checkpoint_says(run, elsewhere, monkeypatch):
    from cairn.training import execution

    asked = run.recipe.model_copy(update={"checkpoint": run.recipe.checkpoint.model_copy(update={"store": "http://127.0.0.1:9/x"})})
    monkeypatch.setattr(execution, "recipe_of", lambda checkpoint: asked)
    with pytest.raises(InputError, match=r"lineage\.json names 'http://127\.0\.0\.1:9/x', which is not opened"):
        resume(run.path)


def test_keepers_of_a_stranger_are_not_spoken_to(tmp_path, elsewhere, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was made"))
    folder = tmp_path / "run" / link.KEEPERS
    link.identity(tmp_path / "run")
    home = {"name": "n-0", "node": "far", "folder": "/tmp/x", "pid": 1, "host": "127.0.0.1", "port": 9, "secret": "s"}
    (folder / "n-0.json").write_text(json.dumps(home))
    assert list(link.homes(tmp_path / "run")) == ["n-0"]  # begun here
    elsewhere()
    for asks in (lambda: link.homes(tmp_path / "run"), lambda: link.identity(tmp_path / "run"), lambda: attend.status(tmp_path / "run")):
        with pytest.raises(InputError, match=r"names keepers.*--follow"):
            asks()


def test_a_note_is_bound_to_the_run_that_was_begun(tmp_path):
    link.identity(tmp_path / "run")
    (tmp_path / "run" / link.KEEPERS / link.IDENTITY).write_text("another run in its place")
    with pytest.raises(InputError, match="names keepers"):
        link.refuse_strangers(tmp_path / "run")


def test_a_home_that_cannot_be_written_is_no_hindrance(elsewhere, monkeypatch, tmp_path):
    elsewhere()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CAIRN_STATE", str(tmp_path / "file" / "inside"))
    trust.note("data", "x")
    assert trust.known("data", "x") and not trust.known("data", "y")
