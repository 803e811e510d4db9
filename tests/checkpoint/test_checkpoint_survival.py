"""Probabilities against every pattern of losses and against simulation; intervals against a search."""

import itertools
import math
import random

import pytest

from cairn.checkpoint.memory.survival import best_interval, draw, fatal_rate, group_sizes, group_survival, job_survival, node_survival, overhead, survival
from cairn.errors import InputError


@pytest.mark.parametrize(("groups", "parity"), [([3, 3], 1), ([4, 3], 2), ([2, 2, 2], 1), ([5], 0), ([6, 5], 3)])
@pytest.mark.parametrize("alive", [0.5, 0.93])
def test_the_formula_is_the_sum_over_all_patterns_of_losses(groups, parity, alive):
    total = 0.0
    for pattern in itertools.product([0, 1], repeat=sum(groups)):
        chance = math.prod(alive if up else 1 - alive for up in pattern)
        rest, survived = list(pattern), True
        for members in groups:
            group, rest = rest[:members], rest[members:]
            survived &= group.count(0) <= parity
        total += chance * survived
    assert job_survival(alive, groups, parity) == pytest.approx(total, rel=1e-12)


def test_limits():
    assert job_survival(1.0, [4, 4], 1) == 1
    assert group_survival(0.9, 2, 1) == pytest.approx(1 - 0.1**2), "two nodes with parity are mirrors"
    assert group_survival(0.9, 5, 4) == pytest.approx(1 - 0.1**5)
    assert job_survival(0.98, [6] * 8, 0) == pytest.approx(0.379, abs=5e-4)
    assert job_survival(0.98, [6] * 8, 1) == pytest.approx(0.9554, abs=5e-5)


@pytest.mark.parametrize("shape", [0.7, 1.0, 1.6])
def test_lives_follow_weibulls_law_with_the_mean_that_was_given(shape):
    chooser, mean, hours = random.Random(1), 100.0, 60.0
    scale = mean / math.gamma(1 + 1 / shape)
    lives = [chooser.weibullvariate(scale, shape) for _ in range(40_000)]
    assert sum(lives) / len(lives) == pytest.approx(mean, rel=0.03)
    lived = sum(life > hours for life in lives) / len(lives)
    assert node_survival(hours, mean, shape) == pytest.approx(lived, abs=4 * math.sqrt(0.25 / len(lives)))


def test_the_rate_with_repair_is_that_of_a_simulation():
    """A group of four, parity 1; every lost node is good again after a fixed time, and the losses within it are counted."""
    chooser, mtbf, repair = random.Random(2), 50.0, 2.0
    time, fatal, until = 0.0, 0, 400_000.0
    down = -math.inf
    alive = 4
    while time < until:
        time += chooser.expovariate(alive / mtbf)
        if time < down:
            fatal, down, alive = fatal + 1, -math.inf, 4  # back from disk, all new
            continue
        # The others' first loss within the repair: exponential at the rate of three.
        further = chooser.expovariate(3 / mtbf)
        if further < repair:
            fatal += 1
            time += further
        else:
            time += repair
    expected = fatal_rate([4], 1, mtbf, repair)
    share_up = 1 / (1 + repair * 4 / mtbf)  # while a node is repaired no first loss begins
    assert fatal / until == pytest.approx(expected * share_up, rel=4 / math.sqrt(fatal))


@pytest.mark.parametrize(("stall", "between"), [(1.0, 1000.0), (10.0, 300.0), (0.05, 86_400.0)])
def test_no_other_interval_costs_less(stall, between):
    """Against the exact cost of exponential failures: M exp(r / M) (exp((T + d) / M) - 1) / T."""

    def exact(interval):
        return between * math.expm1((interval + stall) / between) / interval

    best = min((math.sqrt(2 * stall * between) * 1.002**n for n in range(-1000, 700)), key=exact)
    assert best_interval(stall, between) == pytest.approx(best, rel=0.01)
    assert best_interval(stall, between) == pytest.approx(math.sqrt(2 * stall * between), rel=0.4), "Young's first order"
    assert overhead(100.0, stall, math.inf, 0.0) == stall / 100


def test_groups_are_as_equal_as_can_be():
    assert group_sizes(64, 8) == [8] * 8 and sorted(group_sizes(10, 4)) == [3, 3, 4] and group_sizes(3, 8) == [3]


def test_more_parity_and_keepers_always_help_and_the_assumptions_are_said():
    found = [survival(32, parity=parity, software=200.0) for parity in (0, 1, 2)]
    chances = [each["lost_with_parity"] for each in found]
    assert chances == sorted(chances, reverse=True) and chances[0] == found[0]["lost_with_keepers_alone"] < found[0]["lost_without_memory_protection"]
    assert any("independently" in sentence for sentence in found[1]["assumptions"])
    assert found[1]["overhead"] < found[1]["disk_alone"]["overhead"]


@pytest.mark.parametrize(
    ("options", "sentence"), [({"parity": 8}, "groups of more nodes"), ({"mtbf": -1}, "greater than 0"), ({"mtbff": 1}, "Did you mean 'mtbf'")]
)
def test_impossible_jobs_are_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        survival(16, **options)


def test_the_curve_is_drawn(tmp_path):
    assert draw(tmp_path / "curve.png", 16, parity=1).read_bytes()[:4] == b"\x89PNG"
