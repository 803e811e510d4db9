"""Tasks: what is asked of a model, and tasks that are written down in a file."""

import csv

import numpy as np
import pytest

from cairn.errors import InputError, NotFoundError
from cairn.evaluation import analysis, measure, results
from cairn.evaluation.choices import Item, judged
from cairn.evaluation.measure import evaluate, with_options
from cairn.evaluation.measurements.brackets import closings
from cairn.evaluation.measurements.generation import GenerationTask
from cairn.evaluation.measurements.gsm8k import Gsm8k
from cairn.evaluation.measurements.instruction_induction import InstructionInduction
from cairn.evaluation.trajectory import sparkline, write_csv
from cairn.options import configure

QUIZ = "name: multiple-choice\npath: quiz.jsonl\ncontext: 'Q: {question}\\nA:'\nchoices: options\nanswer: correct\n"


def test_scores_of_choices_are_counted_by_hand():
    items = [Item("a", (" x", " yyyy"), 1), Item("b", (" x", " y"), 0), Item("c", (" x", " y", " z"), 2)]
    found = {score.metric: score for score in judged("t", items, np.array([-2.0, -3.0, -1.0, -1.0, -5.0, -4.0, -3.0]))}
    assert found["accuracy"].value == pytest.approx(2 / 3)  # the first is missed, the tie goes to the first, the last is right
    assert found["accuracy_per_byte"].value == 1.0  # -3 / 5 is more than -2 / 2
    assert found["log_likelihood"].value == pytest.approx(-7 / 3) and found["accuracy"].chance == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)


def test_brackets_close_their_own_kind_within_the_window():
    assert closings("f(a[1], {b})", 50) == [(3, 5), (8, 10), (1, 11)]
    assert closings("f(a[1], {b})", 3) == [(3, 5), (8, 10)]
    assert closings("a) (b] (c)", 50) == [(7, 9)]


def test_the_next_token_is_right_where_the_logits_say_so(small_run):
    import torch

    from cairn.training.sources import open_data

    checkpoint, measure_ = small_run.newest(), configure("measurement", {"name": "next-token", "sequences": 9, "by_source": True})
    _, feed = open_data(small_run.recipe.data, small_run.recipe.seed, checkpoint.tokenizer)
    both = measure_.of(checkpoint.model().eval(), checkpoint.tokenizer, feed)
    samples = feed.held_out(9)
    tokens, weights = torch.tensor(samples.tokens), samples.weights
    with torch.no_grad():
        right = (checkpoint.model().eval()(tokens[:, :-1]).logits.argmax(-1) == tokens[:, 1:]).numpy()
    counts = np.bincount(samples.tokens[:, 1:].ravel(), weights.ravel())
    assert [score.task for score in both] == ["next-token", "next-token/walks"] and both[0].value == both[1].value
    assert both[0].value == pytest.approx((right * weights).sum() / weights.sum(), abs=1e-9) and both[0].chance == pytest.approx(counts.max() / counts.sum())
    assert 0.1 < both[0].value < 1


def test_a_next_token_counts_as_much_as_its_weight():
    from cairn.evaluation.measurements.held_out import HeldOutWindows

    tokens, weights = np.array([[5, 5, 6], [6, 7, 6]]), np.array([[1, 0, 2], [1, 1, 1]], np.float32)
    right = np.array([[True, True, False], [False, True, True]])
    seen = HeldOutWindows(tokens, weights, np.ones_like(tokens), np.zeros(2, np.int64), np.zeros((2, 3)), right)
    (score,) = configure("measurement", "next-token").scores("next-token", seen)
    assert score.value == pytest.approx(3 / 6) and score.chance == pytest.approx(4 / 6)  # 6 weighs 4 of 6, and is 3 of 6


PLAY = "A stage.\n\nROMEO:\nSpeak.\n\nJULIET:\nNo:\nWhat is it\n\nFirst Citizen:\nUp.\n\nNurse:\nHere.\n\nPARIS:\nAy.\n"
CODE = "import os\nimport sys\nfrom os import path\n    import re as r\nx = 'we import nothing'\nimport json.tool\n"


def test_names_are_found_and_the_others_are_as_long(monkeypatch):
    from cairn.evaluation.held_out_text import HeldOutText

    monkeypatch.setattr(HeldOutText, "documents", lambda self, tokenizer, feed, only: {"plays": [PLAY], "code": [CODE]}[only])
    speakers = configure("measurement", {"name": "known-names", "names": "speaker", "source": "plays", "choices": 3, "context": 9})
    items = speakers.questions(None)
    assert sorted(item.choices[item.answer] for item in items) == ["First Citizen:", "JULIET:", "Nurse:", "PARIS:", "ROMEO:"]
    assert next(item.context for item in items if item.choices[item.answer] == "JULIET:") == "\nSpeak.\n\n"
    of_romeo = next(item.choices for item in items if item.choices[item.answer] == "ROMEO:")
    assert sorted(of_romeo) == ["Nurse:", "PARIS:", "ROMEO:"], "the two of five letters"
    assert speakers.questions(None) == items and {item.answer for item in items} > {0}
    imports = configure("measurement", {"name": "known-names", "source": "code", "choices": 2, "context": 30}).questions(None)
    assert sorted(item.choices[item.answer] for item in imports) == ["json.", "os\n", "path\n", "re ", "sys\n"]
    assert all(len(set(item.choices)) == 2 and len({choice[-1] for choice in item.choices}) == 1 for item in imports)
    with pytest.raises(InputError, match="5 different names to choose among; 9 are needed"):
        configure("measurement", {"name": "known-names", "names": "speaker", "source": "plays", "choices": 9}).questions(None)


def test_names_that_can_not_be_found_are_refused(small_run):
    with pytest.raises(InputError, match=r"has no source 'walk'\. Did you mean 'walks'"):
        evaluate(small_run.newest(), [{"name": "known-names", "names": "(a)", "source": "walk"}], store=False)
    for wrong, sentence in (("(", "nor a regular expression"), ("ab", "has 0 groups")):
        with pytest.raises(InputError, match=sentence):
            configure("measurement", {"name": "known-names", "names": wrong})


def test_results_of_problems_are_right_once_and_stand_anywhere(real_data):
    items = Gsm8k(problems=60).questions(None)
    assert items[0].context.startswith("Question: Janet") and items[0].choices[items[0].answer] == " 18"
    assert all(len(set(item.choices)) == 4 for item in items) and {item.answer for item in items} == {0, 1, 2, 3}
    assert Gsm8k(problems=60).questions(None) == items != Gsm8k(problems=60, seed=1).questions(None)


def test_inputs_follow_solved_examples_of_their_own_task(real_data):
    items = InstructionInduction(tasks=["sum"], inputs=5, examples=2).questions(None)
    for item in items:
        *shown, asked = item.context.split("Input: ")[1:]
        assert len(shown) == 2 and asked.endswith("\nOutput:")
        a, b = map(int, asked.removesuffix("\nOutput:").split())
        assert item.choices[item.answer] == f" {a + b}"
    assert len({item.context.split("Input: ")[-1] for item in InstructionInduction(inputs=1).questions(None)}) >= 20
    with pytest.raises(NotFoundError, match="Did you mean 'antonyms'"):
        InstructionInduction(tasks=["antonym"]).questions(None)


def test_a_task_in_a_file_is_found_beside_it_and_bears_its_name(small_run, tmp_path):
    (tmp_path / "quiz.yaml").write_text(QUIZ)
    (tmp_path / "quiz.jsonl").write_text('{"question": "stone?", "options": ["on", "trail"], "correct": 1}\n')
    rows = evaluate(small_run.newest(), with_options([str(tmp_path / "quiz.yaml")], []), store=False)
    assert {row.task for row in rows} == {"quiz"} and rows[0].n == 1
    chosen = with_options([str(tmp_path / "quiz.yaml"), "blimp"], ["quiz.items=1", "blimp.pairs=3"])
    assert chosen[0]["items"] == 1 and chosen[1] == {"name": "blimp", "pairs": 3}
    (tmp_path / "quiz.jsonl").write_text('{"question": "stone?", "options": ["on", "trail"], "right": 1}\n')
    with pytest.raises(InputError, match=r"line 1 has no key 'correct'"):
        evaluate(small_run.newest(), with_options([str(tmp_path / "quiz.yaml")], []), store=False)


@pytest.mark.parametrize(
    ("text", "what"), [("- a\n", "a task is a mapping"), ("name: [\n", "is not YAML"), ("name: multiple-choise\n", "Did you mean 'multiple-choice'")]
)
def test_files_that_are_no_tasks_are_refused(tmp_path, text, what):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(InputError, match=what):
        with_options([str(tmp_path / "t.yaml")], [])
    with pytest.raises(NotFoundError, match="no task file"):
        with_options([str(tmp_path / "u.yaml")], [])


def test_answers_are_compared_as_asked():
    whole, number = GenerationTask(path="x"), GenerationTask(path="x", extract=r"(-?\d+)")
    assert whole._asked(" 12 apples ") == "12 apples" and number._asked("first 3, then 12 apples") == "12" and number._asked("none") is None
    assert GenerationTask(path="x", extract=r"[0-9]*")._asked("five") is None, "nothing is no answer"
    with pytest.raises(InputError, match="not a regular expression"):
        configure("measurement", {"name": "generation", "path": "x", "extract": "("})


def test_only_what_is_missing_of_a_run_is_measured_and_told(small_run):
    told: list[str] = []
    task = [{"name": "held-out", "sequences": 5}]
    evaluate(small_run.newest(), task)
    rows = evaluate(small_run.path, task, progress=told.append)
    assert [line.split(" (")[0] for line in told] == ["step-00000005", "step-00000010", "step-00000015"] and "(2 of 4): held-out" in told[1]
    assert evaluate(small_run.path, task, progress=told.append) == rows and len(told) == 3
    (results.folder(small_run.newest()) / f"{small_run.newest().model_digest[:16]}-{'0' * 16}.items.json").write_text('{"seen": {}}')
    stored = measure.stored_rows(small_run.path)
    assert all(row in stored for row in rows)


def test_a_run_is_read_as_curves_and_written_as_a_table(small_run, tmp_path):
    rows = evaluate(small_run.path, [{"name": "word-swap", "sentences": 15}])
    table = [row for row in analysis.table([small_run.path]) if row.task == "word-swap" and row.n == 15]
    assert table == rows
    (found,) = analysis.analyse(rows).tasks
    assert found.checkpoints == 4 and found.phase in ("floor", "rise", "plateau") and found.last == rows[-1].value
    with write_csv(rows, tmp_path / "t.csv").open() as file:
        assert [float(row["value"]) for row in csv.DictReader(file)] == [row.value for row in rows]
    assert sparkline([1, 2, 3]) == "▁▅█" and sparkline([2, 2]) == "▁▁"


def test_the_verdict_is_by_the_distance_from_the_reference(small_run):
    from dataclasses import replace

    (row, *_) = evaluate(small_run.newest(), [{"name": "word-swap", "sentences": 15}])
    row = replace(row, value=0.3, stderr=0.01)
    points = [replace(row, step=step, tokens=step) for step in (1, 2, 3, 4)]
    reference = [replace(row, run=name, value=value, tokens=3) for name, value in (("a", 0.6), ("b", 0.62), ("c", 0.64))]
    (found,) = analysis.analyse(points, reference).tasks
    assert found.verdict == "stalled" and found.distance == pytest.approx((0.3 - 0.62) / 0.02)
    (found,) = analysis.analyse([replace(p, value=0.63) for p in points], reference).tasks
    assert found.verdict == "ok"
    (found,) = analysis.analyse(points, reference[:2]).tasks
    assert found.verdict is None
