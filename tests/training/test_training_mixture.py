"""Mixtures that change on the way: by the recipe, by a callback, on a resume and on a fork; prefetching is never wrong about it."""

import json
import math
import shutil

import numpy as np
import pytest

from cairn import catalog
from cairn.checkpoint.format import read, summary
from cairn.checkpoint.operating import diff
from cairn.errors import InputError, ResumeError
from cairn.training import recipe as recipes
from cairn.training.callbacks import Callback, Handler
from cairn.training.loggers import Logger
from cairn.training.loop import Trainer
from cairn.training.parallel import World
from cairn.training.run import fork, resume, train
from cairn.training.sources import fitted, open_data

A, B, EVEN = {"a": 1, "b": 0}, {"a": 0, "b": 1}, {"a": 1, "b": 1}
CLOCK = {"tokens_per_second", "seconds"}


@pytest.fixture(scope="session")
def two_sources(small_recipe, corpus_file, tmp_path_factory) -> dict:
    """`small_recipe` with two sources of eight sequences a step: the walks, and the same with every word in capitals."""
    path = tmp_path_factory.mktemp("capitals") / "capitals.jsonl"
    path.write_text(corpus_file.read_text().upper().replace('"TEXT"', '"text"').replace("\\N", "\\n"))
    sources = {"a": {"corpus": str(corpus_file)}, "b": {"corpus": str(path)}}
    return small_recipe | {"data": small_recipe["data"] | {"sources": sources}}


def mixture(*changes) -> str:
    return "data.mixture=" + json.dumps([{"at": at, "weights": weights} for at, weights in changes])


def rows(run):
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in run.metrics()]


def trainer(recipe, *overrides):
    loaded = recipes.load(recipe, overrides)
    tokenizer, feed = open_data(loaded.data, loaded.seed)
    import torch

    return Trainer(fitted(loaded, tokenizer).pinned(), tokenizer, feed, World(0, 1, torch.device("cpu")), Logger())


def sources_read(each: Trainer, steps: int) -> list[list[int]]:
    """For each step the numbers of the sources of its sequences, as the loop consumed them."""
    found, honest = [], each.update
    capitals = set(each.preprocessor.encode("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))

    def update(micro_batches):
        found.append([int(bool(capitals & set(row))) for micro_batch in micro_batches for row in micro_batch.inputs["input_ids"].tolist()])
        return honest(micro_batches)

    each.update = update
    list(each.run(steps))
    return found


@pytest.mark.parametrize("at", ["5 steps", "1280 tokens", "1025 tokens", "25%"])
def test_the_switch_is_exact_to_one_batch(two_sources, at):
    read_ = sources_read(trainer(two_sources, mixture((0, A), (at, B))), 8)
    assert read_ == [[0] * 8] * 5 + [[1] * 8] * 3


def test_shares_follow_the_schedule_within_each_phase(two_sources):
    each = trainer(two_sources, mixture((0, {"a": 3, "b": 1}), ("2000 steps", {"a": 1, "b": 9})), "training.tokens=4000 steps")
    each._plan_mixture()
    drawn = each.feed.mixture.draws(np.arange(4000 * 8))[0].reshape(2, -1)
    for phase, share in zip(drawn, (0.25, 0.9), strict=True):
        assert abs(phase.mean() - share) < 3 * math.sqrt(share * (1 - share) / len(phase))


@pytest.mark.parametrize("stop", [4, 5, 6])
def test_a_resume_before_at_and_after_the_switch_changes_no_bit(two_sources, tmp_path, stop):
    change = mixture(("5 steps", {"a": 0.1, "b": 0.9}), ("15 steps", A))
    whole = train(two_sources, tmp_path / "whole", [change])
    train(two_sources, tmp_path / "cut", [change], stop_at_step=stop)
    again = resume(tmp_path / "cut")
    assert rows(again) == rows(whole) and again.newest().digest == whole.newest().digest
    history = whole.newest().trainer["feed"]["mixture"]
    assert history == [[0, {"a": 1.0, "b": 1.0}], [40, {"a": 0.1, "b": 0.9}], [120, {"a": 1.0, "b": 0.0}]]
    cursor = whole.newest().trainer["feed"]["cursor"]
    assert sum(cursor.values()) == 160 and cursor["a"] == pytest.approx(20 + 8 + 40, abs=4)


def test_a_change_of_the_mixture_does_not_touch_the_learning_rate(two_sources, tmp_path):
    plain, changed = (train(two_sources, tmp_path / name, settings) for name, settings in (("p", []), ("c", [mixture(("5 steps", B))])))
    assert [row["learning_rate"] for row in plain.metrics()] == [row["learning_rate"] for row in changed.metrics()]
    assert rows(plain)[:5] == rows(changed)[:5] and rows(plain)[5:] != rows(changed)[5:]


# -- by a callback ---------------------------------------------------------------------------------------------------


class Alternate(Callback):
    """For these tests: one source after the other, changed after every third update."""

    def handler(self, trainer):
        return _Alternate(trainer)


class _Alternate(Handler):
    def __init__(self, trainer):
        self.trainer = trainer

    def after_update(self, moment):
        if moment.step % 3 == 0:
            self.trainer.change_mixture(B if moment.step % 2 else A)


@pytest.fixture
def alternating(monkeypatch):
    monkeypatch.setattr(catalog, "_entries", dict(catalog._entries))
    catalog.register("callback", "alternate")(Alternate)
    return "callbacks=[alternate]"


def test_what_was_prepared_ahead_is_never_of_the_old_mixture(two_sources, alternating):
    read_ = sources_read(trainer(two_sources, alternating, mixture((0, A), ("10 steps", B))), 20)
    expected = [0] * 3 + [1] * 3 + [0] * 3 + [1] + [1] * 2 + [0] * 3 + [1] * 3 + [0] * 2
    assert read_ == [[source] * 8 for source in expected]


@pytest.mark.parametrize("stop", [3, 7])
def test_changes_by_an_event_survive_a_kill(two_sources, alternating, tmp_path, stop):
    whole = train(two_sources, tmp_path / "whole", [alternating])
    train(two_sources, tmp_path / "cut", [alternating], stop_at_step=stop)
    again = resume(tmp_path / "cut")
    assert rows(again) == rows(whole) and again.newest().digest == whole.newest().digest
    assert len(whole.newest().trainer["feed"]["mixture"]) == 7


def test_a_source_is_left_out_once_it_has_been_read_often_enough(two_sources, tmp_path):
    settings = ["data.sources.b.subset=640", "callbacks=[{name: repeats, every: 5 steps, limit: 2}]"]
    whole = train(two_sources, tmp_path / "whole", settings)
    train(two_sources, tmp_path / "cut", settings, stop_at_step=11)
    again = resume(tmp_path / "cut")
    assert rows(again) == rows(whole) and again.newest().digest == whole.newest().digest
    (_, (position, weights)) = whole.newest().trainer["feed"]["mixture"]
    assert weights == {"a": 1.0, "b": 0.0} and position % 8 == 0
    told = [row["passes/b"] for row in whole.metrics() if "passes/b" in row]
    assert len(told) == 4 and told == sorted(told) and 2 <= told[-1] == told[-2] < 2 + 8 / 20
    assert whole.newest().trainer["feed"]["cursor"]["b"] == round(told[-1] * 20), "passes are counted reads over the size of the subset"


@pytest.mark.parametrize("stop", [6, 12])
def test_schedule_mixture_rule_and_average_together_survive_a_kill(two_sources, tmp_path, stop):
    settings = [
        mixture(("4 steps", {"a": 1, "b": 3}), ("12 steps", {"a": 3, "b": 1})),
        "data.sources.b.subset=640",
        "callbacks=[{name: repeats, every: 5 steps, limit: 2}, {name: ema, decay: 0.5}]",
        "schedule={name: infinite, warmup: 2 steps, cooldown: 8 steps, anneal: 5 steps, anneal_at: 15 steps}",
    ]
    whole = train(two_sources, tmp_path / "whole", settings)
    train(two_sources, tmp_path / "cut", settings, stop_at_step=stop)
    again = resume(tmp_path / "cut")
    assert rows(again) == rows(whole) and again.newest().digest == whole.newest().digest
    assert [weights["b"] for _, weights in whole.newest().trainer["feed"]["mixture"]] == [1, 3, 0, 0], "the rule has the last word over the plan"


# -- on a resume and on a fork -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(two_sources, tmp_path_factory):
    return train(two_sources, tmp_path_factory.mktemp("half") / "run", stop_at_step=10)


def test_a_resume_may_change_what_is_still_to_come_and_says_so(half, two_sources, tmp_path):
    shutil.copytree(half.path, tmp_path / "r")
    run = resume(tmp_path / "r", [mixture(("10 steps", B), ("15 steps", A))])
    assert run.newest().trainer["feed"]["mixture"] == [[0, {"a": 1.0, "b": 1.0}], [80, {"a": 0.0, "b": 1.0}], [120, {"a": 1.0, "b": 0.0}]]
    assert run.metrics()[9]["loss"] == half.metrics()[9]["loss"]
    first = read.open(run.checkpoints()[2])
    assert any(line.startswith("data.mixture: [] -> [{'at': '10 steps'") for line in first.lineage.changed)
    assert any("data.mixture" in line for line in summary.log(first)[0]["changed"])
    told = [entry["mixture"] for entry in summary.log(run.newest())]
    assert told == [[], ["from sequence 80: a 0, b 1", "from sequence 120: a 1, b 0"], [], []], "at the first checkpoint whose next sequence it decides"
    assert diff.diff(half.path, run.path).mixture == ({"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 0.0})
    assert "data.mixture" in diff.diff(half.path, run.path).recipe


def test_a_resume_may_not_change_the_weights_of_the_past(half):
    with pytest.raises(ResumeError, match=r"cannot change data.sources.a.weight"):
        resume(half.path, ["data.sources.a.weight=2"])


@pytest.mark.parametrize("asked", [mixture(("10 steps", {"a": 1, "b": 3})), "data.sources.b.weight=3"])
def test_a_fork_with_another_mixture_reads_every_source_on(half, tmp_path, asked):
    branch = fork(half.path, tmp_path / "f", [asked])
    state = branch.newest().trainer
    assert state["position"] == 160 and state["feed"]["mixture"][1] == [80, {"a": 1.0, "b": 3.0}]
    before = half.newest().trainer["feed"]["cursor"]
    assert {name: state["feed"]["cursor"][name] - before[name] for name in before} == pytest.approx({"a": 20, "b": 60}, abs=3)
    assert branch.checkpoints()[0].name == "step-00000015"


def test_a_fork_onto_other_data_is_mixed_as_the_recipe_wants_it_from_there_on(half, corpus_file, tmp_path):
    sources = json.dumps({"a": {"corpus": str(corpus_file)}, "c": {"corpus": str(corpus_file)}})
    change = "data.mixture=[{at: 5 steps, weights: {a: 0, c: 1}}, {at: 12 steps, weights: {a: 1, c: 0}}]"
    state = fork(half.path, tmp_path / "f", [f"data.sources={sources}", change]).newest().trainer
    assert state["feed"]["mixture"] == [[0, {"a": 0.0, "c": 1.0}], [16, {"a": 1.0, "c": 0.0}]] and state["position"] == 80


def test_what_an_event_has_changed_stays_in_a_fork_that_changes_something_else(two_sources, alternating, tmp_path):
    half = train(two_sources, tmp_path / "half", [alternating], stop_at_step=10)
    state = fork(half.path, tmp_path / "f", ["callbacks=[]", "optimizer.lr=1e-3"]).newest().trainer
    assert state["feed"]["mixture"] == half.newest().trainer["feed"]["mixture"]


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (mixture(("5 steps", {"a": 1})), r"mixture.0.weights must name every source.*'b' is missing"),
        (mixture(("5 steps", {"a": 1, "b": 1, "bb": 1})), "'bb' is no source. Did you mean 'b'"),
        (mixture(("5 steps", {"a": -1, "b": 1})), "must not be negative"),
        (mixture(("5 steps", {"a": 0, "b": 0})), "at least one must be positive"),
        (mixture(("5 steps", A), ("25%", B)), "must follow each other"),
        ("data.mixture=[{at: 5 steps, weights: {a: 1, b: 1}, wait: 1}]", "unknown key 'data.mixture.0.wait'.*at"),
    ],
)
def test_impossible_mixtures_are_refused_before_anything_is_made(two_sources, tmp_path, change, sentence):
    with pytest.raises(InputError, match=sentence):
        train(two_sources, tmp_path / "r", [change])
    assert not (tmp_path / "r").exists()
