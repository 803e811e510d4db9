"""Ways to ask, and how stable their scores are along a run."""

import json

import numpy as np
import pytest

from cairn.data.text.tokenizer import byte_level
from cairn.errors import InputError
from cairn.evaluation.audits import stability
from cairn.evaluation.measurements.choice import ChoiceTask, filled
from cairn.evaluation.measurements.light_instruction import LightInstruction, read_answer
from tests.evaluation.test_evaluation_leakage import Bytes


def test_a_constant_score_has_no_stability_at_all():
    found = stability.of_scores([0.5] * 6)
    assert found.tau is None and found.p is None and found.violations == 0
    assert stability.of_items(np.ones((4, 10))).interval is None
    assert stability.consistency([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).tau is None


def test_a_rise_is_stable_a_fall_is_not_and_violations_are_counted():
    rise = stability.of_scores([0.1, 0.2, 0.3, 0.25, 0.5, 0.6], chance=0.25, stderr=0.05)
    assert rise.tau == pytest.approx(13 / 15) and rise.violations == 1 and rise.above_chance and rise.p < 0.05
    assert stability.of_scores([3.0, 2.0, 1.0]).tau == -1
    assert stability.of_scores([3.0, 1.0, 2.0], order=[30, 10, 20]).tau == 1


def test_the_interval_covers_the_tau_of_the_true_scores():
    """A run whose true accuracies rise from 0.3 to 0.7 has tau 1; few items hide it, and the interval says so."""
    chooser, true, covered = np.random.default_rng(0), np.linspace(0.3, 0.7, 8), 0
    for seed in range(20):
        right = chooser.random((8, 150)) < true[:, None]
        low, high = stability.of_items(right, seed=seed).interval
        covered += low <= 1.0 and high >= 0.9
    assert covered >= 18


@pytest.mark.parametrize(
    ("question", "template", "expected"),
    [
        ("why", "Question: {question}\nAnswer: ___", ("Question: why\nAnswer:", " so")),
        ("the ___ is wet", "unused {question} ___", ("the", " so is wet")),
        ("___ it is", "{question}___", ("", "so it is")),
    ],
)
def test_the_blank_is_filled_and_what_follows_it_counts(question, template, expected):
    assert filled(question, "so", template) == expected


ITEMS = [{"question": f"what {i}", "options": [f"rain{i}", "stone", "the way"], "answer": i % 3} for i in range(15)]


def asked(tmp_path, rows, model, **options):
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ChoiceTask(path=path, **options).look(model, byte_level())


def test_the_order_of_options_does_not_change_a_filled_blank_but_changes_letters(tmp_path, small_run):
    order = [2, 0, 1]
    turned = [row | {"options": [row["options"][i] for i in order], "answer": order.index(row["answer"])} for row in ITEMS]
    model = Bytes(2)
    for ask, same in (("blank", True), ("content", True), ("letter", False)):
        one, other = (asked(tmp_path, rows, model, ask=ask) for rows in (ITEMS, turned))
        said = [[row["options"][choice] for row, choice in zip(rows, each["said"], strict=True)] for rows, each in ((ITEMS, one), (turned, other))]
        assert (said[0] == said[1]) is same


def test_scores_are_those_computed_by_hand(tmp_path):
    """A model whose next byte depends on the one before it: sums over bytes, divided as the normaliser says."""
    model, tokenizer = Bytes(1), byte_level()
    logs = model.table.detach().double().log_softmax(-1).numpy()

    def total(text, start):
        ids = [tokenizer.eos_id, *tokenizer.encode(text)]
        return sum(logs[ids[i - 1] + 1, ids[i]] for i in range(1 + start, len(ids)))

    row = ITEMS[0]
    head = "Question: what 0\nAnswer:"
    sums = np.array([total(f"{head} {option}", len(head)) for option in row["options"]])
    sizes = np.array([len(option) + 1 for option in row["options"]])
    assert asked(tmp_path, [row], model, normaliser="none")["scores"][0] == pytest.approx(sums.tolist(), abs=1e-4)
    assert asked(tmp_path, [row], model)["scores"][0] == pytest.approx((sums / sizes).tolist(), abs=1e-4)
    alone = np.array([total(f"Answer: {option}", len("Answer:")) for option in row["options"]])
    assert asked(tmp_path, [row], model, normaliser="unconditional")["scores"][0] == pytest.approx((sums - alone).tolist(), abs=1e-4)
    whole = np.array([total(f"{head} {option}", 0) / len(f"{head} {option}") for option in row["options"]])
    assert asked(tmp_path, [row], model, ask="content")["scores"][0] == pytest.approx(whole.tolist(), abs=1e-4)


def test_equal_scores_are_ties_and_go_to_the_first(tmp_path):
    rows = [{"question": "q", "options": ["ab", "ab"], "answer": 1}]
    seen = asked(tmp_path, rows, Bytes(1))
    scores = {score.metric: score.value for score in ChoiceTask(path=tmp_path / "items.jsonl").scores(seen)}
    assert seen["said"] == [0] and scores == {"accuracy": 0, "ties": 1}


def test_solved_examples_have_the_same_form_and_are_not_scored(tmp_path):
    seen = asked(tmp_path, ITEMS, Bytes(1), shots=3)
    assert len(seen["right"]) == 12
    with pytest.raises(InputError, match="none is left to score"):
        asked(tmp_path, ITEMS[:3], Bytes(1), shots=3)
    with pytest.raises(InputError, match="from 0 to 1"):
        asked(tmp_path, [{"question": "q", "options": ["a", "b"], "answer": 2}], Bytes(1))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 12.\n\nmore", "12"),
        ("The answer is 12.", None),
        ("12.\n\n", None),
        ("  The answer is  two words .\n\n", "two words"),
        ("The answer is 12. Yes.\n\n", "12. Yes"),
    ],
)
def test_an_answer_is_read_in_its_form_or_not_at_all(text, expected):
    assert read_answer(text, "The answer is ___.", "\n\n") == expected


def test_compliance_is_reported_beside_accuracy(tmp_path, small_run):
    path = tmp_path / "open.jsonl"
    path.write_text("".join(json.dumps({"input": f"say {word}", "output": word}) + "\n" for word in ("rain", "stone", "way", "trail")))
    measurement = LightInstruction(path=path, shots=2, new_tokens=6)
    seen = measurement.look(small_run.newest().model(), byte_level())
    assert {score.metric for score in measurement.scores(seen)} == {"accuracy", "compliance"} and len(seen["text"]) == 2
    full = {**seen, "said": seen["answer"], "right": [True, True]}
    assert {score.metric: score.value for score in measurement.scores(full)} == {"accuracy": 1, "compliance": 1}


def test_a_run_chooses_its_way_of_asking_on_other_items_than_it_reports(small_run, tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ITEMS))
    tasks = [{"name": "choice", "path": str(path), "ask": ask} for ask in ("blank", "letter")]
    found = stability.stability(small_run.path, tasks, store=False)
    assert len(found["steps"]) == 4 and [len(each["scores"]) for each in found["tasks"]] == [4, 4]
    assert found["tasks"][0]["label"] == "choice/blank" and found["chosen"] in (*tasks, None)
    with pytest.raises(InputError, match="single items"):
        stability.stability(small_run.path, ["held-out"])
    with pytest.raises(InputError, match="at least 3"):
        stability.stability(tmp_path, tasks)
