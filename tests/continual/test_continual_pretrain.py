"""Going on with a checkpoint: re-warming, replay, plans of data, annealing branches; what is measured of it."""

import json
import math
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn.checkpoint.format import read
from cairn.continual.plan import TokenBudget, read_so_far, substituted, unique
from cairn.continual.pretrain import anneal, continue_, settings_to_anneal
from cairn.errors import InputError
from cairn.evaluation.audits import gap
from cairn.evaluation.measure import Score
from cairn.training.run import fork, resume, train

SOURCES = "callbacks=[{name: evaluate, every: 5 steps, measurements: [{name: held-out, sequences: 8, by_source: true}]}]"


def losses(run):
    return [row["loss"] for row in run.metrics()]


@pytest.fixture(scope="session")
def capitals(corpus_file, tmp_path_factory):
    """The walks in capitals: a domain of its own."""
    path = tmp_path_factory.mktemp("capitals") / "capitals.jsonl"
    texts = [json.loads(line)["text"].upper() for line in corpus_file.read_text().splitlines()]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def trunk(small_recipe, tmp_path_factory):
    """A run on an infinite schedule: 3 steps up, down to a half at step 10, then constant."""
    schedule = "schedule={name: infinite, warmup: 3 steps, cooldown: 10 steps, constant: 0.5}"
    return train(small_recipe, tmp_path_factory.mktemp("trunk") / "trunk", [schedule])


@pytest.fixture(scope="module")
def continued(small_run, capitals, tmp_path_factory):
    folder = tmp_path_factory.mktemp("continued")
    return continue_(small_run.path, folder / "c", {"capitals": str(capitals)}, "12 steps", [SOURCES], rate=1e-3, warmup="3 steps", replay=0.25)


def test_continuing_rewarms_keeps_the_moments_and_replays_the_old_share(continued, small_run):
    rates = [row["learning_rate"] for row in continued.metrics()]
    expected = [1e-3 * n / 3 for n in (1, 1, 2)] + [1e-4 + 9e-4 / 2 * (1 + math.cos(math.pi * (n - 3) / 9)) for n in range(3, 12)]
    assert rates == pytest.approx(expected, abs=1e-12)
    newest, first = continued.newest(), read.open(continued.checkpoints()[0])
    assert first.lineage.parents[0].digest == small_run.newest().digest and newest.step == 32
    assert newest.trainer["feed"]["cursor"] == pytest.approx({"capitals": 72, "walks": 24}, abs=2)
    assert {tensor.load().item() for name, tensor in newest.optimizer.items() if name.endswith("/step")} == {32.0}
    assert any(line.startswith("schedule.name: cosine -> rewarm") for line in first.lineage.changed)


def test_both_sides_are_measured_from_before_the_first_update(continued, small_run):
    before = {figure: score.value for figure, score in gap.at_the_fork(continued).items()}
    assert before["held-out/walks/loss"] < before["held-out/capitals/loss"] - 1, "the old model knows one of them"
    seen, lost = gap.both_sides(continued, "walks", "capitals")
    assert seen.gain == pytest.approx(before["held-out/capitals/loss"] - seen.new_end) and seen.gain > 0.2
    assert seen.forgetting == pytest.approx(lost.end - lost.start) and lost.start == before["held-out/walks/loss"]
    table = gap.gap([continued], "walks", "capitals")
    assert table["pareto"] == [table["runs"][0]["name"]] and table["runs"][0]["gap"]["depth"] == lost.depth
    with pytest.raises(InputError, match="no figure 'held-out/plays/loss'"):
        gap.both_sides(continued, "plays", "capitals")


def test_fresh_moments_are_asked_for_and_recorded(small_run, capitals, tmp_path):
    run = continue_(small_run.path, tmp_path / "f", {"capitals": str(capitals)}, "2 steps", fresh=["optimizer"])
    assert "optimizer state: kept -> fresh" in run.newest().lineage.changed
    assert {tensor.load().item() for name, tensor in run.newest().optimizer.items() if name.endswith("/step")} == {2.0}


@pytest.mark.parametrize("stop", [21, 26])
def test_a_continued_run_resumes_exactly(continued, small_run, capitals, tmp_path, stop):
    again = continue_(
        small_run.path, tmp_path / "c", {"capitals": str(capitals)}, "12 steps", [SOURCES], rate=1e-3, warmup="3 steps", replay=0.25, stop_at_step=stop
    )
    again = resume(again.path)
    assert losses(again) == losses(continued) and again.newest().digest == continued.newest().digest


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"data": {}}, "at least one corpus"),
        ({"replay": 1.0}, "at least 0 and below 1"),
        ({"tokens": "10%"}, "in tokens or steps"),
        ({"data": {"walks": "python-docs"}, "replay": 0.5}, "nothing to replay"),
        ({"plan": TokenBudget(epochs=500)}, "too few for 500 epochs"),
    ],
)
def test_what_can_not_be_continued_is_refused_before_anything_is_made(small_run, capitals, tmp_path, options, sentence):
    asked = {"data": {"capitals": str(capitals)}, "tokens": "12 steps", **options}
    with pytest.raises(InputError, match=sentence):
        continue_(small_run.path, tmp_path / "r", **asked)
    assert not (tmp_path / "r").exists()


# -- trunk and leaves ------------------------------------------------------------------------------------------------


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_branch_leaves_the_trunk_byte_identical_and_its_next_loss_bit_equal(trunk, small_recipe, tmp_path):
    whole = train(trunk.recipe, tmp_path / "whole", ["training.tokens=26 steps"])
    shutil.copytree(trunk.path, tmp_path / "trunk")
    before = contents(tmp_path / "trunk")
    leaf = anneal(tmp_path / "trunk", tmp_path / "leaf", "6 steps", final=0.05)
    assert contents(tmp_path / "trunk") == before
    assert [row["learning_rate"] / 3e-3 for row in leaf.metrics()] == pytest.approx([0.5 * 0.1 ** (n / 6) for n in range(6)])
    further = resume(tmp_path / "trunk", ["training.tokens=26 steps"])
    assert losses(further) == losses(whole) and further.newest().digest == whole.newest().digest
    assert losses(leaf)[0] == losses(further)[20] and losses(leaf)[1] == losses(further)[21] and losses(leaf)[3] != losses(further)[23]


def test_keeping_an_infinite_schedule_changes_no_rate_that_it_has_given(trunk, capitals, tmp_path):
    run = continue_(trunk.path, tmp_path / "c", {"capitals": str(capitals)}, "4 steps", schedule="keep")
    assert [row["learning_rate"] for row in run.metrics()] == [1.5e-3] * 4


def test_any_schedule_can_be_annealed_from_where_it_stands(small_run, tmp_path):
    source = small_run.checkpoints()[1]
    leaf = anneal(source, tmp_path / "leaf", "4 steps", final=0.05)
    start = 0.1 + 0.9 / 2 * (1 + math.cos(math.pi * (10 - 3) / 17))
    assert [row["learning_rate"] / 3e-3 for row in leaf.metrics()] == pytest.approx([start * (0.05 / start) ** (n / 4) for n in range(4)])
    with pytest.raises(InputError, match=r"cannot fall to 0\.9"):
        settings_to_anneal(source, "4 steps", final=0.9)


# -- plans --------------------------------------------------------------------------------------------------------------


@given(st.integers(20, 500), st.integers(1, 9), st.floats(0.2, 1.0))
def test_epochs_times_the_subset_are_the_budget(sequences, epochs, share):
    tokens, length = sequences * 32, 32
    n = round(tokens * share / length)
    if n < epochs:
        return
    subset = unique(tokens, share, epochs, length) // length
    assert epochs * (subset - 1) < n <= epochs * subset and abs(n / subset - epochs) < max(1, epochs / subset)


def test_each_sequence_of_the_subset_is_read_once_an_epoch_and_the_first_is_the_baseline(small_run, capitals, tmp_path):
    from cairn.training.sources import open_data

    once, thrice = (
        continue_(small_run.path, tmp_path / str(epochs), {"capitals": str(capitals)}, "12 steps", plan=TokenBudget(epochs=epochs)) for epochs in (1, 3)
    )
    assert once.recipe.data.sources["capitals"].subset is None
    feeds = [open_data(run.recipe.data, run.recipe.seed, run.newest().tokenizer)[1] for run in (once, thrice)]
    baseline, repeated = (feed.samples(np.arange(96)).window for feed in feeds)
    assert repeated[:32].tolist() == baseline[:32].tolist() and len(set(baseline.tolist())) == 96
    assert all(sorted(repeated[i : i + 32]) == sorted(repeated[:32]) for i in (32, 64)) and repeated[32:64].tolist() != repeated[:32].tolist()
    assert losses(thrice)[:4] == losses(once)[:4] and losses(thrice)[4:] != losses(once)[4:]
    feed, state = feeds[1], thrice.newest().trainer["feed"]
    counted = read_so_far(thrice.recipe.plain(), state, feed.epoch_tokens)["capitals"]
    assert counted == {"tokens": 96 * 32, "unique": 32 * 32, "passes": 3.0}


def test_the_web_gives_its_place_to_the_domain():
    assert substituted({"web": 8, "code": 1, "books": 1}, "web", "medicine") == {"medicine": 0.8, "code": 0.1, "books": 0.1}
    with pytest.raises(InputError, match="must have 'www'"):
        substituted({"web": 1}, "www", "medicine")


def test_a_subset_larger_than_the_source_is_refused(small_recipe, tmp_path):
    with pytest.raises(InputError, match=r"a subset of \d+ is none"):
        train(small_recipe, tmp_path / "r", ["data.sources.walks.subset=10M"])
    assert not (tmp_path / "r").exists()


# -- the gap ----------------------------------------------------------------------------------------------------------


def test_a_gap_of_a_known_form():
    """A loss that rises by 0.4 in 10 steps and falls back by step 30, then 0.2 lower by step 50."""
    found = gap.stability_gap([0, 10, 30, 50], [2.0, 2.4, 2.0, 1.8])
    assert (found.depth, found.at, found.recovery, found.gain) == pytest.approx((0.4, 10, 30, 0.2))
    assert found.area == pytest.approx((0.4 * 10 / 2 + 0.4 * 20 / 2) / 50)
    up = gap.stability_gap([0, 10, 30, 50], [0.6, 0.2, 0.6, 0.8], higher_is_better=True)
    assert (up.depth, up.area, up.recovery) == pytest.approx((0.4, found.area, 30))


def test_no_gap_and_a_gap_for_ever():
    falling = gap.stability_gap([0, 5, 10], [3.0, 2.0, 1.0])
    assert (falling.depth, falling.area, falling.recovery, falling.gain) == (0, 0, 0, 2)
    rising = gap.stability_gap([0, 5, 10], [1.0, 2.0, 3.0])
    assert rising.recovery == math.inf and rising.area == pytest.approx(1.0) and rising.gain == -2
    with pytest.raises(InputError, match="ascending"):
        gap.stability_gap([0, 0], [1, 2])
    assert gap.measurable(0.6, 0.02, 0.5) and not gap.measurable(0.53, 0.02, 0.5)


def test_the_gap_of_an_accuracy_is_that_of_its_curve_where_it_can_have_one(continued):
    rows = continued.metrics()
    assert any("held-out/walks/loss" in row for row in rows)
    before = {"held-out/walks/loss": Score("held-out/walks", "loss", 9.0, 0.1, 8, chance=0.5), "a/b": Score("a", "b", 1.0, 0.1, 8)}
    found = gap.task_gap(continued, "held-out/walks/loss", before)  # whatever the figure, higher counts as better
    values = [9.0, *(row["held-out/walks/loss"] for row in rows if "held-out/walks/loss" in row)]
    assert found.depth == pytest.approx(9.0 - min(values)) and found.gain == pytest.approx(values[-1] - 9.0)
    guessing = {"held-out/walks/loss": Score("held-out/walks", "loss", 0.6, 0.1, 8, chance=0.5)}
    assert gap.task_gap(continued, "held-out/walks/loss", guessing) is None
    for figure, sentence in (("a/b", "is not an accuracy"), ("a/c", "began from has no figure 'a/c'")):
        with pytest.raises(InputError, match=sentence):
            gap.task_gap(continued, figure, before)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12))
def test_the_area_is_the_integral_of_the_part_above_the_start(values):
    times = np.arange(len(values))
    fine = np.linspace(0, len(values) - 1, 40_001)
    lost = np.maximum(0, np.interp(fine, times, values) - values[0])
    assert gap.stability_gap(times, values).area == pytest.approx(np.trapezoid(lost, fine) / (len(values) - 1), abs=1e-3)


def test_a_transition_and_the_runs_that_none_beats():
    a = gap.transition("a", [0, 1, 10], [2.0, 2.5, 2.2], [4.0, 4.1, 1.0])
    assert (a.old_rise, a.new_rise, a.forgetting, a.gain) == pytest.approx((0.5, 0.1, 0.2, 3.0))
    b, c = (gap.transition(n, [0, 10], [2.0, old], [4.0, new]) for n, old, new in (("b", 2.1, 1.5), ("c", 2.3, 1.2)))
    assert gap.pareto([a, b, c]) == ["a", "b"]
    assert gap.crossing([0, 1, 2, 3], [5, 2, 4, 1], [3, 3, 3, 3]) == 3 and gap.crossing([0, 1], [1, 4], [2, 2]) == math.inf


def test_a_fork_that_continues_may_itself_be_forked(continued, tmp_path):
    """Nothing of the continuing is outside the recipe: its own checkpoints are like any other."""
    branch = fork(continued.checkpoints()[-2], tmp_path / "f")
    assert losses(branch) == losses(continued)[-len(losses(branch)) :]
