"""Spikes of a series against a loop that looks at each step; the report of a run and of a run of several stages."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cairn.errors import InputError, NotFoundError
from cairn.evaluation.audits.training_stability import draw, growth, spikes, stability


def looked_at(values, window: int, threshold: float) -> list[int]:
    found = []
    for step in range(window, len(values)):
        before = [v for v in values[step - window : step] if math.isfinite(v)]
        mean, deviation = (np.mean(before), np.std(before)) if before else (0.0, 0.0)
        if not math.isfinite(values[step]) or abs(values[step] - mean) > threshold * deviation:
            found.append(step)
    return found


values = st.one_of(st.integers(-4, 4).map(float), st.sampled_from([100.0, math.nan, math.inf]))


@given(st.lists(values, max_size=60), st.integers(2, 12), st.sampled_from([0.5, 1.5, 3.0]))
def test_every_step_is_judged_by_those_before_it(series, window, threshold):
    assert spikes(series, window, threshold).tolist() == looked_at(series, window, threshold)


@given(arrays(np.float64, 300, elements=st.floats(0.9, 1.1)), st.integers(129, 299))
def test_one_planted_spike_is_found_and_nothing_else_changes(series, at):
    series[0:128:2], series[1:128:2] = 0.9, 1.1
    planted = series.copy()
    planted[at] = 5.0
    before = set(spikes(series).tolist())
    assert before <= set(range(128, 300)) and at in spikes(planted)
    assert {step for step in spikes(planted) if step < at} == {step for step in before if step < at}


def test_a_series_no_longer_than_the_window_is_not_judged():
    assert spikes([1.0] * 127 + [50.0]).tolist() == [] and spikes([1.0, 1.1] * 64 + [50.0]).tolist() == [128]


def test_growth_is_the_ratio_of_two_medians():
    assert growth([5.0] * 10 + [2.0] * 80 + [6.0] * 10) == 3.0
    assert growth([1.0] * 19) is None


def test_the_report_of_a_run(small_run, tmp_path):
    (report,) = stability(small_run.path, window=5, threshold=1.5, signals=True, sequences=2)
    rows = small_run.metrics()
    wanted = [rows[index]["step"] for index in looked_at([row["grad_norm"] for row in rows], 5, 1.5)]
    assert report.steps == 20 and report.grad_norm.judged == 15 and report.grad_norm.steps == wanted
    assert report.grad_norm.score == len(wanted) / 15 and wanted
    assert [signal.step for signal in report.signals] == [5, 10, 15, 20] and all(signal.largest_logit > 0 for signal in report.signals)
    assert draw([report], tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_that_is_too_short_has_no_score(small_run):
    (report,) = stability(small_run.path)
    assert report.loss.score is None and report.loss.judged == 0 and report.signals == []


def test_of_a_run_of_several_stages_each_is_reported(staged_run):
    reports = stability(staged_run.path, window=4, signals=True, sequences=2)
    assert [report.run.rpartition("-")[0].rpartition("/")[2] for report in reports] == ["1", "2-anneal", "3-anneal"]
    assert [report.steps for report in reports] == [12, 8, 8] and all(len(report.signals) == 2 for report in reports)


def test_refusals(small_run, tmp_path):
    with pytest.raises(NotFoundError, match=r"no metrics\.jsonl"):
        stability(tmp_path)
    with pytest.raises(InputError, match="at least 2 steps"):
        stability(small_run.path, window=1)
