"""Schedules against their closed forms, and their independence of resumes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn import catalog
from cairn.errors import InputError
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


# -- re-warming (card 8) ---------------------------------------------------------------------------------------------

PEAK, LOW = 3e-4, 3e-5


def rewarmed(steps, warmup, variant="plain", begin=0, until=None):
    """Rates of a re-warmed run of so many steps, and of 20 more."""
    schedule = configure("schedule", {"name": "rewarm", "warmup": f"{warmup} steps", "horizon": f"{steps} steps", "variant": variant, "start": begin * 8})
    pinned = schedule.pinned(8, (begin + steps) * 8)
    return [PEAK * pinned.factor((begin + step) * 8, 8) for step in range(until or steps + 20)]


@pytest.mark.parametrize(("steps", "warmup"), [(200, 0), (200, 2), (200, 20), (50, 50)])
def test_rewarming_is_the_published_formula_wherever_it_begins(steps, warmup):
    def published(n):
        if n < warmup:
            return PEAK * max(1, n) / warmup
        return LOW + (PEAK - LOW) / 2 * (1 + math.cos(math.pi * (n - warmup) / (steps - warmup))) if n < steps else LOW

    for begin in (0, 777):
        assert rewarmed(steps, warmup, begin=begin) == pytest.approx([published(n) for n in range(steps + 20)], abs=1e-16)
    assert rewarmed(steps, warmup)[warmup] == pytest.approx(PEAK if warmup < steps else LOW, abs=1e-16), "continuous where the rise ends"


def test_rewarming_equals_the_schedulers_of_torch():
    import torch
    from torch.optim import lr_scheduler as theirs

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    rise = theirs.LinearLR(optimizer, start_factor=1e-12, end_factor=1.0, total_iters=20)
    fall = theirs.CosineAnnealingLR(optimizer, T_max=180, eta_min=LOW)
    both = theirs.SequentialLR(optimizer, [rise, fall], [20])
    expected = []
    for _ in range(200):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        both.step()
    assert rewarmed(200, 20)[1:200] == pytest.approx(expected[1:], abs=1e-12), "ours takes one step's rate at n = 0, where torch has none"


def test_the_older_formula_of_the_base_models_ends_on_a_flat_piece():
    def published(n):
        clamped = min(n, 200 - 60)
        return PEAK * clamped / 60 if n < 60 else max(LOW, PEAK / 2 * (1 + math.cos(math.pi * (clamped - 60) / 200)))

    rates = rewarmed(200, 60, "legacy")
    assert rates[:200] == pytest.approx([published(n) for n in range(200)], abs=1e-16)
    assert len(set(rates[140:200])) == 1 and rates[199] > 2 * rewarmed(200, 60)[199]


def test_a_long_horizon_makes_the_rate_constant():
    assert rewarmed(10**9, 1, until=21)[1:] == pytest.approx([PEAK] * 20, rel=1e-12)


# -- the infinite schedule (card 87) -------------------------------------------------------------------------------------


def infinite(total=10_000, **options):
    return pinned("infinite", 10, total, **{"warmup": "100 tokens", "cooldown": "1100 tokens", "constant": 0.25, **options})


def test_the_four_phases_at_their_borders_and_between():
    schedule = infinite(anneal="500 tokens", anneal_at="6000 tokens", final=0.01)
    factor = {n: schedule.factor(n, 10) for n in (0, 40, 90, 100, 600, 1100, 1110, 5990, 6000, 6250, 6500, 9000)}
    assert [factor[n] for n in (0, 40, 90, 100)] == pytest.approx([0.1, 0.5, 1.0, 1.0], abs=1e-12)
    assert factor[600] == pytest.approx(0.25 + 0.75 / 2, abs=1e-12)
    assert [factor[n] for n in (1100, 1110, 5990, 6000)] == pytest.approx([0.25] * 4, abs=1e-12)
    assert factor[6250] == pytest.approx(0.25 * math.sqrt(0.01 / 0.25), abs=1e-12)
    assert factor[6500] == pytest.approx(0.01, abs=1e-12) and factor[9000] == factor[6500]


def test_the_inverse_root_goes_from_one_to_the_constant_and_falls_fast_at_first():
    schedule = infinite(cooldown_shape="inverse-sqrt", steepness=3.0)
    assert schedule.factor(100, 10) == pytest.approx(1) and schedule.factor(1100, 10) == 0.25
    middle = (1 / math.sqrt(1 + 3 * 0.5) - 1) / (1 / math.sqrt(4) - 1)
    assert schedule.factor(600, 10) == pytest.approx(1 - 0.75 * middle, abs=1e-12)
    assert schedule.factor(600, 10) < infinite().factor(600, 10)


def prefix_is_kept(name, **options):
    """Whether the first 900 tokens are the same in runs of any length, amounts given in tokens."""
    curves = [[pinned(name, 10, total, warmup="100 tokens", **options).factor(n, 10) for n in range(0, 900, 10)] for total in (1000, 3000, 10**6)]
    return curves[0] == curves[1] == curves[2]


def test_only_the_infinite_schedule_does_not_know_how_long_the_run_is():
    assert prefix_is_kept("infinite", cooldown="400 tokens")
    assert not prefix_is_kept("cosine") and not prefix_is_kept("rewarm")


def test_a_trunk_goes_on_after_its_horizon_and_so_does_its_annealing():
    short = infinite(total=1000).pinned(10, 1000)
    late = short.model_copy(update={"anneal": infinite(anneal="200 tokens").anneal, "anneal_at": infinite(anneal_at="3000 tokens").anneal_at})
    assert short.factor(5000, 10) == 0.25
    assert late.factor(3100, 10) == pytest.approx(0.25 * math.sqrt(0.05 / 0.25))


def test_without_a_cooldown_it_is_warmup_stable_decay_of_transformers_until_the_decay():
    import torch
    from transformers import get_wsd_schedule

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_wsd_schedule(optimizer, num_warmup_steps=10, num_decay_steps=50, num_stable_steps=140)
    ours = infinite(cooldown="100 tokens", constant=1.0, anneal="500 tokens", anneal_at="1500 tokens", final=0.01)
    expected = []
    for _ in range(150):
        optimizer.step()
        theirs.step()
        expected.append(optimizer.param_groups[0]["lr"])
    assert [ours.factor(n * 10, 10) for n in range(150)] == pytest.approx(expected, abs=1e-12), "theirs counts a step from 1"
    assert [ours.factor(1500 + n, 10) for n in (0, 250, 500)] == pytest.approx([1.0, 0.1, 0.01], abs=1e-12)


def test_annealing_upwards_is_refused():
    with pytest.raises(InputError, match="annealing goes down"):
        infinite(constant=0.1, final=0.2)
