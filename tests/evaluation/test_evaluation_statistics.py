"""Statistics against scipy and closed forms."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn import statistics

stats = pytest.importorskip("scipy.stats")
numbers = st.lists(st.integers(-5, 5), min_size=2, max_size=30)


@given(numbers, st.integers(0, 2**31))
def test_ranks_and_spearman_are_scipys(values, seed):
    other = np.random.default_rng(seed).integers(-3, 3, len(values))
    assert np.allclose(statistics.ranks(values), stats.rankdata(values))
    ours = statistics.spearman(values, other)
    if len(set(values)) == 1 or len(set(other.tolist())) == 1:
        assert math.isnan(ours)
    else:
        assert ours == pytest.approx(stats.spearmanr(values, other).statistic, abs=1e-12)


@given(st.integers(0, 60), st.integers(1, 60))
def test_the_interval_of_a_proportion_is_scipys(successes, trials):
    successes = min(successes, trials)
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert statistics.wilson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-9)
    share = successes / trials
    assert statistics.binomial_error(successes, trials) == pytest.approx(math.sqrt(share * (1 - share) / trials))


def test_no_trials_say_nothing():
    assert statistics.wilson(0, 0) == (0.0, 1.0)


def test_the_error_of_a_ratio_of_equal_units_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(size=200)
    value, error = statistics.ratio(values, np.ones(200))
    assert value == pytest.approx(values.mean()) and error == pytest.approx(stats.sem(values))
    assert math.isnan(statistics.ratio([1.0], [2.0])[1])


def test_the_error_of_a_ratio_is_that_of_repeated_samples():
    """A thousand samples of unequal units: the spread of their ratios is what the formula says of one of them."""
    chooser = np.random.default_rng(1)

    def sample():
        sizes = chooser.integers(1, 20, 150)
        return chooser.normal(2.0, 1.0, 150) * sizes, sizes

    ratios = [statistics.ratio(*sample())[0] for _ in range(1000)]
    errors = [statistics.ratio(*sample())[1] for _ in range(50)]
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.08)


def test_the_bootstrap_interval_is_scipys_up_to_its_own_noise():
    values = np.random.default_rng(2).exponential(size=120)
    low, high = statistics.paired_bootstrap(values, draws=4000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert statistics.paired_bootstrap(values, seed=3) == statistics.paired_bootstrap(values, seed=3) != statistics.paired_bootstrap(values, seed=4)
