"""Closed forms of models that learn from models, against simulation; and on a real design."""

import math

import numpy as np
import pytest

from cairn.continual.collapse import expected_trace, factor, gaussian_chain, log_determinant_drift, regression_chain, regression_error
from cairn.errors import InputError

REPETITIONS = 3000


def within_three_errors(simulated, expected):
    error = simulated.std(axis=1, ddof=1) / math.sqrt(simulated.shape[1])
    return np.abs(simulated.mean(1) - expected) <= 3 * error


@pytest.mark.parametrize("keeping", ["replace", "accumulate"])
@pytest.mark.parametrize(("rows", "columns"), [(40, 5), (89, 7), (30, 1)])
def test_the_error_of_ten_generations_is_the_closed_form(rows, columns, keeping):
    random = np.random.default_rng(3)
    design, truth = random.standard_normal((rows, columns)), random.standard_normal(columns)
    simulated = regression_chain(design, truth, 0.7, 10, keeping, REPETITIONS, random)
    expected = [regression_error(design, 0.7, n, keeping) for n in range(1, 11)]
    assert within_three_errors(simulated, expected).all()
    wrong = [regression_error(design, 0.7, n, "accumulate" if keeping == "replace" else "replace") for n in range(1, 11)]
    assert not within_three_errors(simulated, wrong)[4:].any(), "the other policy's formula is told apart"


def test_the_first_generation_is_the_same_and_accumulation_is_bounded():
    assert factor(1, "replace") == factor(1, "accumulate") == 1
    assert all(factor(n, "accumulate") < math.pi**2 / 6 for n in (2, 10, 1000)) and factor(1000, "accumulate") > 1.643
    assert [factor(n, "replace") for n in (2, 7)] == [2, 7]
    design, truth = np.random.default_rng(1).standard_normal((30, 2)), np.ones(2)
    one, other = (regression_chain(design, truth, 0.5, 2, keeping, 50, np.random.default_rng(2)) for keeping in ("replace", "accumulate"))
    assert np.array_equal(one[0], other[0]) and not np.array_equal(one[1], other[1])
    with pytest.raises(InputError, match="counted from 1"):
        factor(0, "replace")


@pytest.mark.parametrize("keeping", ["replace", "accumulate"])
def test_real_inputs_have_their_own_trace(keeping):
    from sklearn.datasets import load_diabetes

    design = load_diabetes(scaled=False).data
    design = (design - design.mean(0)) / design.std(0)
    random = np.random.default_rng(5)
    simulated = regression_chain(design, random.standard_normal(10), 1.0, 10, keeping, REPETITIONS, random)
    assert within_three_errors(simulated, [regression_error(design, 1.0, n, keeping) for n in range(1, 11)]).all()
    same = np.cov(design.T, bias=True)
    assert regression_error(design, 1.0, 1, keeping, same) == pytest.approx(10 / 442), "on its own inputs each direction costs the same"


def test_the_trace_of_gaussian_inputs():
    random = np.random.default_rng(7)
    traces = [np.trace(np.linalg.inv(x.T @ x)) for x in random.standard_normal((4000, 40, 5))]
    assert np.mean(traces) == pytest.approx(expected_trace(40, 5), abs=3 * np.std(traces) / math.sqrt(4000))
    with pytest.raises(InputError, match="at least 7 rows"):
        expected_trace(6, 5)


def test_a_gaussian_collapses_under_replacement_as_fast_as_it_must():
    logs, traces = gaussian_chain(4, 40, 12, "replace", 300, np.random.default_rng(9))
    steps = np.diff(logs, axis=0).mean(0)
    drift = log_determinant_drift(40, 4)
    assert drift == pytest.approx(-0.3676, abs=5e-5)
    assert abs(steps.mean() - drift) <= 3 * steps.std(ddof=1) / math.sqrt(300)
    expected = 4 * (39 / 40) ** np.arange(1, 13)
    assert within_three_errors(traces, expected).all()


def test_and_stays_bounded_under_accumulation():
    logs, _ = gaussian_chain(4, 40, 40, "accumulate", 60, np.random.default_rng(9))
    means = logs.mean(1)
    assert means[-1] - means[0] > -1 and abs(means[-1] - means[20]) < 0.15
    assert log_determinant_drift(40, 4) * 39 < -14, "where replacement would have lost fourteen"
