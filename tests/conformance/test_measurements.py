"""What every measurement promises: the same numbers each time, whatever the batch and the number of processes; kept by digest."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from cairn import catalog
from cairn.evaluation import measure, results
from cairn.options import configure
from tests.faults import torchrun

NAMES = [name for name in catalog.names("measurement") if name != "harness"]  # needs another package: tests/evaluation/test_evaluation_harness.py
QUESTIONS = str(Path(__file__).with_name("questions.json"))
OPTIONS: dict[str, dict] = {
    "activation-statistics": {"sequences": 4, "sequence_length": 16, "blocks": True},
    "held-out": {"sequences": 12},
    "next-token": {"sequences": 12, "by_source": True},
    "known-names": {"names": r"^(\w+) ", "places": 12},
    "held-out-objective": {"objective": {"name": "prefix-lm", "split": "fixed"}, "sequences": 12},
    "blimp": {"paradigms": ["passive_1", "causative"], "pairs": 12},
    "word-swap": {"sentences": 20},
    "gsm8k": {"problems": 6},
    "instruction-induction": {"tasks": ["antonyms", "sum"], "inputs": 4},
    "next-line": {"places": 8, "shortest": 3},
    "cloze": {"sentences": 8},
    "brackets": {"places": 6},
    "generation": {"path": str(Path(__file__).with_name("questions.jsonl")), "new_tokens": 4},
    "multiple-choice": {"path": str(Path(__file__).with_name("choices.jsonl"))},
    "rank-classification": {"path": str(Path(__file__).with_name("choices.jsonl")), "prompts": ["{ctx}", "So: {ctx}"]},
    "choice": {"path": QUESTIONS, "shots": 1},
    "exact-answer": {"path": QUESTIONS, "input": "question"},
    "formats": {"path": QUESTIONS, "input": "question", "output": "answer", "options": "options", "formats": 4, "score": "rank"},
    "leakage": {"path": QUESTIONS, "orders": 6},
    "light-instruction": {"path": QUESTIONS, "input": "question", "shots": 2, "new_tokens": 8},
}
SMALL_BATCH: dict[str, dict] = {"held-out": {"batch": 1}, "next-token": {"batch": 1}, "blimp": {"batch_tokens": 1}, "accuracy": {"batch": 1}}


def task(name, **more):
    return {"name": name, **OPTIONS.get(name, {}), **more}


def figures(rows):
    return [(row.task, row.metric, row.n, row.chance) for row in rows], [row.value for row in rows]


@pytest.fixture
def subject(name, small_run, image_run):
    """A finished run of the field whose models the measurement measures."""
    return image_run if catalog.get("measurement", name).implementation.reads == "images" else small_run


@pytest.fixture(autouse=True)
def data(request):
    if any(name in request.node.name for name in ("blimp", "gsm8k", "instruction")):
        request.getfixturevalue("real_data")


def test_at_least_two_measurements_stand_here():
    assert len(NAMES) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_the_same_numbers_each_time_with_an_error_each(name, subject):
    one, two = (measure.evaluate(subject.newest(), [task(name)], store=False) for _ in range(2))
    assert [asdict(row) for row in one] == [asdict(row) for row in two]
    assert one and all(row.n > 0 and row.stderr >= 0 for row in one)


@pytest.mark.parametrize("name", sorted(SMALL_BATCH))
def test_the_batch_changes_nothing(name, subject):
    many, one = (measure.evaluate(subject.newest(), [task(name, **more)], store=False) for more in ({}, SMALL_BATCH[name]))
    assert figures(one)[0] == figures(many)[0] and figures(one)[1] == pytest.approx(figures(many)[1], abs=1e-5)
    assert [row.protocol for row in one] == [row.protocol for row in many]


WORKER = """
import json, os, sys
from dataclasses import asdict
import torch.distributed as dist
from cairn.evaluation import measure
dist.init_process_group("gloo")
rows = measure.evaluate(sys.argv[1], json.loads(sys.argv[2]), store=False)
open(f"{sys.argv[3]}/{dist.get_rank()}.json", "w").write(json.dumps([asdict(row) for row in rows]))
os._exit(0)  # as the command line's workers leave: see cairn.cli.main
"""


def test_two_processes_find_what_one_finds(small_run, tmp_path, real_data):
    """All measurements of text in one launch."""
    (tmp_path / "worker.py").write_text(WORKER)
    newest, tasks = str(small_run.newest().path), [task(name) for name in NAMES if catalog.get("measurement", name).implementation.reads == "tokens"]
    torchrun(2, tmp_path / "worker.py", newest, json.dumps(tasks), str(tmp_path))
    one = measure.evaluate(small_run.newest(), tasks, store=False)
    for rank in (0, 1):
        rows = json.loads((tmp_path / f"{rank}.json").read_text())
        assert [(row["task"], row["metric"]) for row in rows] == [(row.task, row.metric) for row in one]
        assert [row["value"] for row in rows] == pytest.approx([row.value for row in one], abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_measured_once_is_not_measured_again(name, subject, monkeypatch):
    first = measure.evaluate(subject.newest(), [task(name)])
    method = configure("measurement", task(name))
    monkeypatch.setattr(type(method), "of", lambda *_: pytest.fail("measured again"))
    assert measure.evaluate(subject.newest(), [task(name)]) == first
    kept = json.loads(next(results.folder(subject.newest()).glob(f"*{first[0].protocol[:16]}.json")).read_text())
    assert kept["model_digest"] == subject.newest().model_digest and kept["protocol"]["name"] == name


@pytest.mark.parametrize("name", NAMES)
def test_other_options_are_another_protocol(name):
    method = configure("measurement", task(name))
    key = {"held-out": "sequences", "blimp": "pairs", "word-swap": "sentences", "multiple-choice": "items", "gsm8k": "problems"}.get(name)
    if key is not None:
        assert method.protocol() != method.model_copy(update={key: 7}).protocol()
