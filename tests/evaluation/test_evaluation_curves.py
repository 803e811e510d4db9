"""Curves against planted ones, scipy, and the public trajectories of Pythia."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn import statistics
from cairn.errors import InputError, NotFoundError
from cairn.evaluation import curves, harness_results

numbers = st.lists(st.integers(-4, 4), min_size=2, max_size=20)


@given(numbers, st.integers(0, 99))
def test_kendall_and_isotonic_are_those_of_libraries(values, seed):
    stats, isotonic = pytest.importorskip("scipy.stats"), pytest.importorskip("sklearn.isotonic")
    other = np.random.default_rng(seed).integers(-3, 3, len(values))
    expected = stats.kendalltau(values, other).statistic
    assert statistics.kendall(values, other) == pytest.approx(expected, nan_ok=True, abs=1e-12)
    fitted = isotonic.IsotonicRegression().fit_transform(range(len(values)), values)
    assert statistics.isotonic(values) == pytest.approx(fitted, abs=1e-9)


def test_a_rising_series_is_smooth_and_a_falling_one_is_not():
    rising = np.linspace(0.3, 0.6, 12)
    up, down = curves.smoothness(rising, np.full(12, 0.001)), curves.smoothness(rising[::-1], np.full(12, 0.001))
    assert (up.tau, up.drops, up.scatter) == (1.0, 0.0, pytest.approx(0.0, abs=1e-12)) and (down.tau, down.drops) == (-1.0, 1.0)


@given(st.floats(0.1, 5), st.floats(-3, 3))
def test_similarity_does_not_see_affine_maps(scale, shift):
    values = np.random.default_rng(0).normal(size=(2, 15))
    plain = {"a": dict(enumerate(values[0])), "b": dict(enumerate(values[1]))}
    mapped = plain | {"b": dict(enumerate(scale * values[1] + shift))}
    assert curves.similarity(mapped) == pytest.approx(curves.similarity(plain), abs=1e-9)


def test_noise_at_chance_is_floor_in_95_of_100_draws():
    n, draws = 500, np.random.default_rng(0).binomial(500, 0.25, size=(1000, 27)) / 500
    errors = np.sqrt(draws * (1 - draws) / n)
    floors = [set(curves.phases(v, e, 0.25, np.arange(1, 28))) == {"floor"} for v, e in zip(draws, errors, strict=True)]
    assert np.mean(floors) >= 0.95


def test_a_curve_that_rises_and_stops_has_all_three_phases():
    noise = np.random.default_rng(1).normal(0, 0.002, 18)
    values = np.array([0.25] * 5 + list(np.linspace(0.3, 0.6, 7)) + [0.6] * 6) + noise
    found = curves.phases(values, np.full(18, 0.01), 0.25, 2.0 ** np.arange(18))
    assert found == ["floor"] * 5 + ["rise"] * 7 + ["plateau"] * 6


@pytest.mark.parametrize("b", [0.3, 0.6, 1.0])
def test_a_planted_exponent_is_found_within_three_errors(b):
    tokens = np.geomspace(1e8, 3e11, 25)
    values = 0.7 - 0.3 * (tokens / 1e8) ** -b + np.random.default_rng(2).normal(0, 0.004, 25)
    found = curves.power_law(tokens, values)
    assert abs(found.b - b) <= 3 * found.error and found.c == pytest.approx(0.7, abs=0.05)
    assert found.a == pytest.approx(0.3 * 1e8**found.b, rel=0.2)


def test_a_power_law_is_refused_where_there_is_none():
    with pytest.raises(InputError, match="at least 8"):
        curves.power_law([1, 2, 3], [1, 2, 3])
    with pytest.raises(InputError, match="covers 0"):
        curves.power_law(np.geomspace(1, 1e4, 20), np.random.default_rng(0).normal(size=20))


def test_a_group_is_never_used_to_predict_itself():
    chooser = np.random.default_rng(3)
    x, groups = chooser.normal(size=(40, 2)), np.repeat(["s", "m", "l", "xl"], 10)
    y = x @ [1.0, -2.0] + 0.5
    assert curves.left_out(x, y, groups).error == pytest.approx(0, abs=1e-9) and curves.left_out(x, y, groups).r2 == pytest.approx(1)
    spoilt = y.copy()
    spoilt[groups == "m"] += 100  # seen by the other three fits, not by its own
    design = np.column_stack([x, np.ones(40)])
    own = np.linalg.lstsq(design[groups != "m"], y[groups != "m"], rcond=None)[0]
    alone = curves.left_out(x, spoilt, np.where(groups == "m", "m", "rest"))
    assert np.allclose(own, [1, -2, 0.5]) and alone.error > 50


def test_promotion_finds_a_planted_lag():
    chooser = np.random.default_rng(4)
    runs = []
    for _ in range(8):
        steps = chooser.normal(size=30)
        runs.append((np.cumsum(steps), np.cumsum(np.concatenate([[0.0], steps[:-1]]) + chooser.normal(0, 0.5, 30))))
    now, later = curves.promotion(runs, 0), curves.promotion(runs, 1)
    assert later[1] > 0.5 and now[1] < 0 < now[2]


def test_a_ranking_is_decided_from_where_it_no_longer_changes():
    table = {"a": {1: 1, 2: 3, 3: 3, 4: 3}, "b": {1: 2, 2: 1, 3: 2, 4: 2}, "c": {1: 3, 2: 2, 3: 1, 4: 1}}
    assert curves.decision_step(table)[0] == 3


def test_results_that_are_none_are_refused(tmp_path):
    with pytest.raises(NotFoundError, match="no result file"):
        harness_results.load(tmp_path / "nothing")
    (tmp_path / "a.json").write_text('{"x": 1}')
    with pytest.raises(InputError, match="no results"):
        harness_results.load(tmp_path)


def test_both_ways_of_writing_results_are_read(tmp_path):
    config = {"model_args": "revision=step3000"}
    old = {"results": {"piqa": {"acc": 0.6, "acc_stderr": 0.01}}, "versions": {"piqa": 0}, "config": config | {"num_fewshot": 5}}
    new = {"results": {"piqa": {"alias": "piqa", "acc,none": 0.6, "acc_stderr,none": 0.01}}, "versions": {"piqa": 1}, "config": config}
    (tmp_path / "pythia-70m").mkdir()
    for name, text in (("a", old), ("b", new)):
        (tmp_path / "pythia-70m" / f"{name}.json").write_text(json.dumps(text))
    rows = harness_results.load(tmp_path, 2**21)
    assert [(r.run, r.step, r.tokens, r.task, r.metric, r.value, r.chance, r.n) for r in rows] == [
        ("pythia-70m", 3000, 3000 * 2**21, "piqa", "acc", 0.6, 0.5, 2401)
    ] * 2
    assert rows[0].protocol != rows[1].protocol and harness_results.size_of("pythia-70m-0.25MtokBS") == 70e6
