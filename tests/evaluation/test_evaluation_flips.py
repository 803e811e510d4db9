"""Flips, their identities, and what a measurement must tell to count them."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn.errors import InputError, MismatchError
from cairn.evaluation.audits.flips import compare, flips, rouge

answers = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


def seen(said, right):
    return {"said": list(said), "right": [a == b for a, b in zip(said, right, strict=True)]}


@given(answers)
def test_the_identities_of_flips(rows):
    right, before, after = zip(*rows, strict=True)
    found = compare(seen(before, right), seen(after, right))
    assert found.new - found.old == pytest.approx(found.positive - found.negative, abs=1e-12)
    assert found.negative <= min(found.old, 1 - found.new) + 1e-12
    assert found.negative - 1e-12 <= found.changed_wrong <= 1 - found.new + 1e-12
    assert found.trust is None if found.old == 0 else found.trust == pytest.approx(1 - found.negative / found.old)
    assert len(found.flipped) == round(found.negative * found.n) and found.negative_interval[0] <= found.negative <= found.negative_interval[1]


@given(answers)
def test_nothing_flips_from_a_model_to_itself(rows):
    right, before, _ = zip(*rows, strict=True)
    found = compare(seen(before, right), seen(before, right), seen(before, right))
    assert (found.negative, found.positive, found.changed_wrong, found.p) == (0, 0, 0, 1)
    for low, high in (found.above_floor, found.change, found.negative_interval):
        assert low <= 0 <= high and high - low > 0.005, "no change that was seen is not no change"


def test_the_floor_is_taken_away_item_by_item():
    old = {"right": [True] * 100}
    new, twin = {"right": [False] * 30 + [True] * 70}, {"right": [True] * 90 + [False] * 10}
    found = compare(old, new, twin)
    assert found.floor == 0.1 and found.above_floor[0] > 0 and found.above_floor[0] < 0.2 < found.above_floor[1]
    assert found.changed_wrong is None, "answers were not recorded"
    assert -0.4 < found.change[0] < -0.3 < found.change[1] < -0.2, "paired: the items that stay add no noise"


def test_gain_and_regression_are_those_of_the_overlap_of_words():
    assert rouge("the stone the", "the stone") == pytest.approx(0.8) and rouge("", "a") == 0 and rouge("A b", "b a") == 1
    old = {"said": ["a b", None, "x"], "answer": ["a b", "c", "y"], "right": [True, False, False]}
    new = {"said": ["a", "c", "z"], "answer": ["a b", "c", "y"], "right": [False, True, False]}
    found = compare(old, new)
    assert found.gain == 1 and found.regression == pytest.approx(1 / 3)


def test_checkpoints_are_compared_once_looked_at(small_run, tmp_path, monkeypatch):
    from cairn.evaluation.measurements.exact_answer import ExactAnswer

    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps({"input": word, "output": "e"}) + "\n" for word in ("the ston", "the rain\nth", "wher", "befor")))
    task = {"name": "exact-answer", "path": str(path), "template": "{input}", "end": " "}
    first, last = small_run.checkpoints()[0], small_run.checkpoints()[-1]
    found = flips(first, last, task)
    expected = [ExactAnswer(path=path, template="{input}", end=" ").look(small_run.newest().model(), small_run.newest().tokenizer)["right"]]
    assert found.new == np.mean(expected)
    monkeypatch.setattr(ExactAnswer, "look", lambda *_: pytest.fail("looked again"))
    assert flips(first, last, task) == found


def test_what_can_not_be_compared_is_refused(small_run, tmp_path):
    with pytest.raises(MismatchError, match="3 and 2 items"):
        compare({"right": [True] * 3}, {"right": [True] * 2})
    with pytest.raises(InputError, match="does not keep its single items"):
        flips(small_run.path, small_run.path, "held-out")
    path = tmp_path / "q.json"
    path.write_text(json.dumps([{"question": "q", "options": ["a", "b"]}]))
    with pytest.raises(InputError, match="whether they are right"):
        flips(small_run.path, small_run.path, {"name": "leakage", "path": str(path)})
