"""Conditions: the stated rule and the interval over seeds decide together, and what is left open is not shown."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as some

from cairn.studies.conditions import above, at_least, at_most, below, between, estimated, judged, lost, stated, verdict


def outcome(values, bound, **options):
    return judged("x", values, bound, **options).outcome


def test_an_interval_that_covers_the_threshold_leaves_it_open():
    assert outcome([0.29, 0.27, 0.18], above(0.05)) == "shown"
    assert outcome([0.29, 0.27, 0.06], above(0.05)) == "undecided", "every seed passes, and their spread leaves it open"
    assert outcome([0.013, 0.068, -0.032], above(0), rule="mean") == "undecided"
    assert outcome([-0.30, -0.31, -0.29], above(0.05)) == "not shown"
    assert outcome([0.303, 0.292, 0.318], between(-0.1, 0.1)) == "not shown"
    assert outcome([0.008, -0.006, 0.001], between(-0.01, 0.01)) == "undecided" != outcome([0.001, -0.001, 0.0], between(-0.01, 0.01))


def test_the_rule_that_was_stated_must_hold_too():
    many = [0.10, 0.11, 0.12, 0.11, 0.10, 0.12, 0.04]
    assert outcome(many, above(0.05)) == "not shown" and outcome(many, above(0.05), rule="mean") == "shown" == outcome(many, above(0.05), rule=6)
    assert judged("x", many, above(0.05), rule=6).required == "> 0.05, in at least 6 of 7 seeds"


def test_what_is_no_number_is_never_shown():
    assert outcome([0.1, math.nan, 0.1], above(0)) == "not shown" == outcome([0.1, math.inf, 0.1], below(1))
    assert outcome([0.1, 0.1, math.inf], below(1), rule=2) == "undecided", "two of three, and a mean that is infinite"
    assert outcome([], above(0)) != "shown" and outcome([1.0], above(0)) == "undecided", "one seed has no interval"


def test_runs_that_are_one_run_differ_by_exactly_nothing():
    assert outcome([0.0, 0.0, 0.0], above(0)) == "not shown" and outcome([0.0, 0.0, 0.0], at_least(0)) == "shown" == outcome([0.0] * 3, at_most(0))


@given(some.lists(some.floats(-1, 1), min_size=3, max_size=6), some.floats(-1, 1))
def test_no_figure_is_shown_to_lie_on_both_sides(values, threshold):
    one, other = (judged("x", values, bound(threshold)) for bound in (above, at_most))
    assert not (one.shown and other.shown)
    for condition in (one, other):
        if condition.interval is None:
            continue
        low, high = condition.interval
        assert condition.shown <= (condition.outcome == "shown") and (low <= threshold <= high) <= (not condition.shown or low == high)


def test_an_interval_of_its_own_decides_too():
    assert estimated("x", "", "", (0.01, 0.02), above(0)).shown and estimated("x", "", "", (-0.01, 0.02), above(0)).outcome == "undecided"
    assert estimated("x", "", "", (math.nan, math.nan), above(0)).outcome != "shown"


def condition(name, holds, main=False, always=False):
    return stated(name, "", "", holds, main=main, always=always)


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ([condition("a", True, main=True), condition("b", True, always=True)], "holds"),
        ([condition("a", True, main=True), condition("b", False), condition("c", True, always=True)], "partly"),
        ([condition("a", False, main=True), condition("b", True), condition("c", True, always=True)], "not at this scale"),
        ([condition("a", True, main=True), condition("b", False, always=True)], "fails"),
        ([condition("a", False, main=True, always=True)], "fails"),
        ([judged("a", [0.3, 0.27, 0.06], above(0.05), main=True)], "not at this scale"),
    ],
)
def test_verdicts(conditions, expected):
    assert verdict(conditions) == expected


def test_a_control_fails_only_what_the_honest_runs_show():
    honest = [condition("a", False), condition("b", True), condition("c", True)]
    assert lost(honest, [condition("a", False), condition("b", True), condition("c", True)]) == []
    assert lost(honest, [condition("c", False), condition("a", True), condition("b", True)]) == ["c"]
