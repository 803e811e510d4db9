"""Schedules against their closed forms, and their independence of resumes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn import catalog
from cairn.options import configure

BATCH = 524_288
TOTAL = 19_073 * BATCH


def pinned(name, batch=BATCH, total=TOTAL, **options):
    return configure("schedule", {"name": name, **options}).pinned(batch, total)


def test_the_published_cosine_at_warmup_end_middle_and_end():
    """Card 01: max * (t + 1) / 715, then cosine to a tenth at step 19073, then constant."""
    schedule = pinned("cosine", warmup="715 steps", final=0.1)

    def published(step):
        if step < 715:
            return (step + 1) / 715
        if step > 19073:
            return 0.1
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 715) / (19073 - 715)))

    for step in (0, 1, 713, 714, 715, 716, 9000, 19072, 19073, 30000):
        assert schedule.factor(step * BATCH, BATCH) == pytest.approx(published(step), abs=1e-12)


def test_a_longer_run_does_not_stretch_a_pinned_schedule():
    schedule = pinned("cosine", warmup="715 steps")
    again = schedule.pinned(BATCH, 3 * TOTAL)
    assert [again.factor(s * BATCH, BATCH) for s in range(0, 19073, 997)] == [schedule.factor(s * BATCH, BATCH) for s in range(0, 19073, 997)]


def test_linear_and_wsd_closed_forms():
    linear = pinned("linear", 10, 1000, warmup="100 tokens", final=0.2)
    assert linear.factor(100, 10) == 1.0
    assert linear.factor(550, 10) == pytest.approx(0.6)
    assert linear.factor(1000, 10) == linear.factor(5000, 10) == pytest.approx(0.2)
    wsd = pinned("wsd", 10, 1000, warmup="100 tokens", decay="20%")
    assert [wsd.factor(t, 10) for t in (0, 90, 100, 790)] == [0.1, 1.0, 1.0, 1.0]
    assert wsd.factor(900, 10) == pytest.approx(0.5)
    assert wsd.factor(1000, 10) == 0.0
    root = pinned("wsd", 10, 1000, decay="20%", decay_shape="sqrt")
    assert root.factor(850, 10) == pytest.approx(1 - math.sqrt(0.25))


def test_the_stable_stretch_does_not_know_the_horizon_and_cosine_does():
    short, long = (pinned("wsd", 10, total, warmup="50 tokens", decay="10%") for total in (1000, 5000))
    assert all(short.factor(t, 10) == long.factor(t, 10) for t in range(0, 900, 10))
    short, long = (pinned("cosine", 10, total, warmup="50 tokens") for total in (1000, 5000))
    assert short.factor(500, 10) != long.factor(500, 10)


def test_restart_and_rewarm():
    restarted = pinned("cosine", 10, 1000, warmup="100 tokens", start="600 tokens")
    fresh = pinned("cosine", 10, 1000, warmup="100 tokens")
    assert restarted.factor(650, 10) == fresh.factor(50, 10)
    rewarmed = pinned("cosine", 10, 1000, rewarm="50 tokens", rewarm_at="500 tokens")
    plain = pinned("cosine", 10, 1000)
    assert rewarmed.factor(490, 10) == plain.factor(490, 10)
    assert rewarmed.factor(500, 10) == pytest.approx(plain.factor(500, 10) * 10 / 50)
    assert rewarmed.factor(540, 10) == plain.factor(540, 10)


@given(st.sampled_from(catalog.names("schedule")), st.integers(1, 64), st.integers(2, 200), st.floats(0, 0.5))
def test_every_factor_lies_between_zero_and_one_and_is_finite(name, batch, steps, warm):
    schedule = pinned(name, batch, batch * steps, warmup=f"{round(steps * warm)} steps")
    factors = [schedule.factor(step * batch, batch) for step in range(steps + 5)]
    assert all(0 <= factor <= 1 + 1e-12 for factor in factors)
    assert factors[round(steps * warm)] > 0 or name != "constant"


def test_the_inverse_square_root_of_the_published_steps():
    schedule = configure("schedule", "inverse-square-root").pinned(1, 10**6)
    assert [0.01 * schedule.factor(step, 1) for step in (1, 10_000, 40_000)] == pytest.approx([0.01, 0.01, 0.005], rel=1e-12)
    warm = configure("schedule", {"name": "inverse-square-root", "warmup": "10 steps", "hold": "20 steps"}).pinned(8, 800)
    assert [warm.factor(8 * step, 8) for step in (0, 9, 10, 20, 80)] == pytest.approx([0.1, 1, 1, 1, 0.5])
