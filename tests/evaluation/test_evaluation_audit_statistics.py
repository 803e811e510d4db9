"""Tests of tests: against scipy, and calibrated where nothing differs."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn import statistics

stats = pytest.importorskip("scipy.stats")
small = st.lists(st.integers(-3, 3), min_size=2, max_size=25)


@given(small, st.integers(0, 2**31))
def test_tau_is_scipys_with_ties_and_undefined_where_a_side_is_constant(values, seed):
    other = np.random.default_rng(seed).integers(-2, 3, len(values))
    ours = statistics.kendall(values, other)
    if len(set(values)) == 1 or len(set(other.tolist())) == 1:
        assert math.isnan(ours) and math.isnan(statistics.kendall_p(values, other, draws=5))
    else:
        assert ours == pytest.approx(stats.kendalltau(values, other).statistic, abs=1e-12)


def test_a_reversed_series_has_tau_minus_one():
    assert statistics.kendall(range(9), range(9, 0, -1)) == -1 and statistics.kendall_p(range(9), range(9), draws=500) < 0.01


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_two_sided_binomial_test(lost, won):
    expected = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert statistics.mcnemar(lost, won) == pytest.approx(expected, abs=1e-10)


@given(st.integers(0, 50), st.floats(0.01, 0.99))
def test_the_binomial_tail_is_scipys(successes, chance):
    assert statistics.binomial_tail(successes, 50, chance) == pytest.approx(stats.binomtest(successes, 50, chance, "greater").pvalue, abs=1e-10)


@given(st.integers(0, 20), st.integers(0, 30))
def test_fisher_is_scipys(successes, control):
    expected = stats.fisher_exact([[successes, 20 - successes], [control, 30 - control]], "greater").pvalue
    assert statistics.fisher(successes, 20, control, 30) == pytest.approx(expected, abs=1e-10)


@given(small, small)
def test_the_rank_sum_test_is_scipys(values, control):
    auc, p = statistics.rank_sum(values, control)
    pairs = [(x > y) + 0.5 * (x == y) for x in values for y in control]
    assert auc == pytest.approx(np.mean(pairs))
    if len({*values, *control}) > 1:
        assert p == pytest.approx(stats.mannwhitneyu(values, control, alternative="greater", method="asymptotic").pvalue, abs=1e-10)
    else:
        assert p == 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_false_discovery_is_scipys(p_values):
    assert statistics.false_discovery(p_values) == pytest.approx(stats.false_discovery_control(p_values), abs=1e-12)


def test_calibrated_p_values_are_valid_for_any_distribution():
    chooser = np.random.default_rng(0)
    p = np.concatenate([statistics.calibrated(chooser.standard_cauchy(100), chooser.standard_cauchy(60)) for _ in range(200)])
    for level in (0.05, 0.1, 0.5):
        assert (p <= level).mean() <= level + 0.02
    assert statistics.calibrated([5.0, 2.0, 1.5], np.arange(3)).tolist() == [0.25, 0.5, 0.5], "as large counts, and the value itself"


def test_a_bootstrap_interval_covers_what_is_true_nine_times_in_ten():
    """A steady rise measured on few items: the tau of the true means is 1, that of the sample less."""
    chooser, covered = np.random.default_rng(1), 0
    for trial in range(60):
        difference = chooser.normal(0.3, 1.0, 80)
        low, high = statistics.bootstrap(lambda pick, d=difference: float(d[pick].mean()), 80, seed=trial, draws=200)
        covered += low <= 0.3 <= high
    assert covered >= 52
    assert math.isnan(statistics.bootstrap(lambda pick: math.nan, 5)[0])


def test_the_null_of_a_spread_is_what_equal_rows_show():
    """64 rows of the same chance: their spread is far from 0, and the permutation of one table says how far."""
    chooser = np.random.default_rng(2)
    observed, expected = [], []
    for trial in range(20):
        table = (chooser.random((64, 100)) < 0.6).astype(float)
        means = table.mean(axis=1)
        observed.append(means.max() - means.min())
        expected.append(statistics.spread_null(table, trial, 20).mean())
    assert min(observed) > 0.1 and np.mean(expected) == pytest.approx(np.mean(observed), abs=0.015)
