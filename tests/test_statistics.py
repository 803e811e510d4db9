"""No interval has width 0, and every interval comes from one module."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cairn
from cairn import statistics


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.booleans())
def test_a_proportion_has_wilsons_interval_and_never_width_0(counts, sample):
    right, n = counts
    share = right / n
    error = math.sqrt(share * (1 - share) / (n - 1 if sample and n > 1 else n))
    low, high = statistics.interval(share, error, n)
    assert (low, high) == pytest.approx(statistics.wilson(right, n), abs=1e-12)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1 and high - low > 1e-4


UNKNOWN = [(2.5, 0.0, 20), (0.5, 0.0, 20), (1.0, None, 20), (1.0, math.nan, 20), (math.nan, 0.1, 20), (1.0, 0.0, None)]


@pytest.mark.parametrize(("value", "stderr", "n"), UNKNOWN)
def test_what_is_not_known_has_no_interval(value, stderr, n):
    assert all(map(math.isnan, statistics.interval(value, stderr, n)))


def test_a_mean_has_the_normal_interval():
    assert statistics.interval(2.0, 0.1, 50) == pytest.approx((2 - 0.19600, 2 + 0.19600), abs=1e-5)


def test_twenty_of_twenty():
    assert statistics.interval(1.0, 0.0, 20) == pytest.approx((0.83887, 1.0), abs=1e-5)
    assert statistics.error(1.0, 0.0, 20) > 0.04


def test_a_difference_of_proportions_is_newcombes():
    """The first example of his table II: 56 of 70 and 48 of 80, 0.0524 to 0.3339."""
    ends = [statistics.wilson(right, n) for right, n in ((48, 80), (56, 70))]
    assert statistics.difference(48 / 80, ends[0], 56 / 70, ends[1]) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_a_difference_of_equal_certainties_has_a_width():
    ends = statistics.wilson(20, 20)
    low, high = statistics.difference(1.0, ends, 1.0, ends)
    assert low < -0.1 and high > 0.1


def test_a_difference_of_normal_figures_is_the_usual_one():
    one, two = statistics.interval(1.0, 0.3), statistics.interval(3.0, 0.4)
    assert statistics.difference(1.0, one, 3.0, two) == pytest.approx((2 - 1.96 * 0.5, 2 + 1.96 * 0.5), abs=1e-4)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_change_of_a_paired_proportion_has_a_width_and_lies_inside(pairs):
    before, after = np.array(pairs).T
    low, high = statistics.paired_proportions(before, after)
    change = after.mean() - before.mean()
    assert low - 1e-12 <= change <= high + 1e-12 and high - low > 1e-3 and low >= -1 and high <= 1


def test_the_interval_of_a_paired_change_covers_as_often_as_it_says():
    """1,000 samples of 40 pairs with shares 0.5 both, 0.2 lost, 0.1 won: the true change is -0.1."""
    draws = np.random.default_rng(0).choice(4, (1000, 40), p=[0.5, 0.2, 0.1, 0.2])
    ends = [statistics.paired_proportions(draw <= 1, (draw == 0) | (draw == 2)) for draw in draws]
    assert 0.93 <= np.mean([low <= -0.1 <= high for low, high in ends]) <= 0.98


@pytest.mark.parametrize("resampled", [lambda: statistics.paired_bootstrap([0.5] * 9), lambda: statistics.bootstrap(lambda picks: 1.0, 9)])
def test_resampling_equal_values_tells_no_interval(resampled):
    assert all(map(math.isnan, resampled()))


def test_a_mean_over_seeds_has_students_interval():
    assert statistics.mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-5)
    assert all(map(math.isnan, statistics.mean_interval([1.0]))) and all(map(math.isnan, statistics.mean_interval([1.0, 1.0])))


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (7, 2.3646), (30, 2.0423), (200, 1.9719)])
def test_students_t(freedom, value):
    assert statistics.student(freedom) == pytest.approx(value, abs=1e-4)


def test_no_other_module_makes_intervals_of_its_own():
    home = Path(cairn.__file__).parent
    own = re.compile(r"1\.96\b|1\.95996|Z95 \*|\* Z95|quantile\([^)]*0\.025")
    found = [str(file) for file in home.rglob("*.py") if file != home / "statistics.py" for line in file.read_text().split("\n") if own.search(line)]
    assert [name for name in found if not name.endswith("formats.py")] == []  # there the error is read off an interval, not made from one
