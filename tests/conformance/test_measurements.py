"""What every measurement promises: the same numbers each time, whatever the batch and the number of processes; kept by digest."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from cairn import catalog
from cairn.errors import InputError
from cairn.evaluation import engine, measure, results
from cairn.evaluation.compute import Compute
from cairn.evaluation.measurements.activation_statistics import Looking
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
TEXT = str(Path(__file__).with_name("held_out.jsonl"))
SPEED = {"batch", "batch_tokens", "micro_batch", "memory"}
"""Options that change nothing but speed."""
OTHER: dict[str, list[dict]] = {
    "activation-statistics": [
        {"calibration": TEXT},
        {"sequences": 3},
        {"sequence_length": 8},
        {"seed": 1},
        {"blocks": False},
        {"micro_batch": 3},
        {"memory": "1 KiB"},
    ],
    "accuracy": [{"samples": 5}, {"split": "train"}, {"by_source": True}, {"batch": 3}],
    "held-out": [{"sequences": 5}, {"corpus": TEXT}, {"corpus": TEXT, "sequence_length": 16}, {"by_source": True}, {"batch": 3}],
    "next-token": [{"sequences": 5}, {"corpus": TEXT}, {"corpus": TEXT, "sequence_length": 16}, {"by_source": False}, {"batch": 3}],
    "held-out-objective": [
        {"objective": "causal-lm"},
        {"objective": {"name": "prefix-lm", "split": "uniform"}},
        {"sequences": 5},
        {"corpus": TEXT},
        {"corpus": TEXT, "sequence_length": 16},
        {"task": "x"},
    ],
    "known-names": [{"seed": 1}, {"names": r"^(\w+) \w"}, {"source": "walks"}, {"places": 5}, {"choices": 3}, {"context": 9}, {"corpus": TEXT}],
    "blimp": [{"paradigms": ["passive_1"]}, {"pairs": 5}, {"details": True}, {"batch_tokens": 60}],
    "word-swap": [{"sentences": 5}, {"words": [6, 9]}, {"seed": 1}, {"corpus": TEXT}],
    "cloze": [{"sentences": 5}, {"words": [6, 9]}, {"seed": 1}, {"corpus": TEXT}],
    "next-line": [{"seed": 1}, {"places": 5}, {"choices": 3}, {"context": 9}, {"shortest": 20}, {"corpus": TEXT}],
    "brackets": [{"seed": 1}, {"places": 3}, {"context": 30}, {"corpus": TEXT}],
    "gsm8k": [{"problems": 4}, {"choices": 3}, {"seed": 1}],
    "instruction-induction": [{"tasks": ["antonyms"]}, {"examples": 2}, {"inputs": 3}, {"choices": 3}, {"seed": 1}],
    "generation": [{"context": "{prompt}!"}, {"answer": "{answer}."}, {"extract": "."}, {"stop": ["e", " "]}, {"new_tokens": 3}, {"items": 2}, {"task": "x"}],
    "multiple-choice": [{"context": "So: {ctx}"}, {"items": 2}, {"task": "x"}],
    "rank-classification": [{"prompts": ["{ctx}"]}, {"items": 2}, {"task": "x"}],
    "choice": [
        {"items": 3},
        *({"ask": ask, "normaliser": normaliser} for ask in ("blank", "content", "letter") for normaliser in ("byte", "token", "none", "unconditional")),
        {"list_options": True},
        {"template": "{question} ___"},
        {"shots": 2},
    ],
    "exact-answer": [{"items": 3}, {"template": "Q {input} A "}, {"end": "."}],
    "formats": [
        {"items": 4},
        {"formats": 3},
        {"default": {"separator": " - "}},
        {"budget": 20, "batch": 2},
        {"shots": 1},
        {"score": "exact"},
        {"instruction": "Say."},
        {"score": "exact", "end": "."},
        {"descriptors": ["Q", "A", "O"]},
        {"options": None, "output": "answer"},
        {"seed": 1},
    ],
    "leakage": [{"items": 3}, {"control": QUESTIONS}, {"choices": 2}, {"orders": 4}, {"control": QUESTIONS, "false_positives": 0.3}, {"seed": 1}],
    "light-instruction": [{"items": 4}, {"instruction": ""}, {"answer": "A: ___"}, {"shots": 1}, {"separator": "\n"}, {"new_tokens": 3}, {"seed": 1}],
}
KEYS = {"path", "question", "options", "answer", "input", "output", "choices", "data", "context"}
"""Options that name the file or its keys: another value of theirs needs another file."""


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


def test_every_measurement_stands_here_with_every_option_of_its_own():
    """A new measurement, or a new option, has no place to hide: it is run with another value than the default."""
    assert set(OPTIONS) | {"accuracy"} == set(NAMES) == set(OTHER)
    for name in NAMES:
        fields = set(catalog.get("measurement", name).implementation.model_fields)
        tried = {key for options in OTHER[name] for key in options}
        assert tried <= fields and fields - tried <= KEYS, f"{name}: no other value of {fields - tried - KEYS} is tried"


@pytest.mark.parametrize("name", NAMES)
def test_the_same_numbers_each_time_with_an_error_each(name, subject):
    one, two = (measure.evaluate(subject.newest(), [task(name)], store=False) for _ in range(2))
    assert [asdict(row) for row in one] == [asdict(row) for row in two]
    assert one and all(row.n > 0 and row.stderr >= 0 for row in one)


@pytest.fixture
def passes(monkeypatch):
    """The rows and the tokens of every forward pass through any model that is measured; a pass that the request engine plans with several
    texts in one row counts as that many rows."""
    seen: list[tuple[int, int]] = []
    opened, planned = Compute.model, engine.plan

    def laid_out(*args):
        made = planned(*args)
        seen.extend((len(one.batch.places), 0) for one in made.passes if len(one.batch.places) > 1)
        return made

    def watched(self, checkpoint):
        model = opened(self, checkpoint)
        model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(_size(args, kwargs)), with_kwargs=True)
        return model

    def looked(self, weight, inputs):
        seen.append((inputs.shape[0], inputs.shape[0] * inputs.shape[1]))
        return look(self, weight, inputs)

    look = Looking.observe
    monkeypatch.setattr(engine, "plan", laid_out)
    monkeypatch.setattr(Compute, "model", watched)
    monkeypatch.setattr(Looking, "observe", looked)
    return seen


def _size(args, kwargs):
    first = next(value for value in (*args, *kwargs.values()) if value is not None)
    return first.shape[0], first.numel()


@pytest.mark.parametrize("name", NAMES)
def test_one_at_a_time_or_many_at_once_is_the_same(name, subject, passes):
    """Really one and many: what passes through the model is looked at."""
    single = {"accuracy": {"batch": 1}, "activation-statistics": {"micro_batch": 1}}.get(name, {})
    many = measure.evaluate(subject.newest(), [task(name)], store=False)
    together = list(passes)
    passes.clear()
    one = measure.evaluate(subject.newest(), [task(name, **single)], store=False, batch_tokens=1)
    apart = list(passes)
    assert {rows for rows, _ in apart} == {1} and len(apart) > len(together) and max(size for _, size in together) > max(size for _, size in apart)
    assert figures(one)[0] == figures(many)[0] and figures(one)[1] == pytest.approx(figures(many)[1], abs=1e-5)
    assert [row.protocol for row in one] == [row.protocol for row in many]


@pytest.mark.parametrize(("name", "key"), [("accuracy", "batch"), ("blimp", "batch_tokens"), ("held-out", "batch"), ("activation-statistics", "micro_batch")])
def test_its_own_option_of_speed_is_obeyed(name, key, subject, passes):
    measure.evaluate(subject.newest(), [task(name)], store=False)
    together = len(passes)
    passes.clear()
    measure.evaluate(subject.newest(), [task(name, **{key: 1})], store=False)
    assert len(passes) > together


@pytest.mark.parametrize("name", NAMES)
def test_every_other_option_is_another_protocol_with_figures_of_its_own(name, subject, monkeypatch):
    """Run with every option changed; what changes the figures changes the protocol, what is only for speed changes neither."""
    usual = measure.evaluate(subject.newest(), [task(name)], store=False)
    for more in OTHER[name]:
        rows = measure.evaluate(subject.newest(), [task(name, **more)], store=False)
        assert rows and all(row.n > 0 and math.isfinite(row.value) for row in rows), more
        if set(more) <= SPEED:
            assert [row.protocol for row in rows] == [row.protocol for row in usual]
            assert [row.value for row in rows] == pytest.approx([row.value for row in usual], abs=1e-5)
        else:
            assert (rows[0].protocol != usual[0].protocol) == (configure("measurement", task(name, **more)) != configure("measurement", task(name))), more


def test_a_lower_precision_and_its_size_of_a_pass_are_another_protocol(small_run):
    digests = [
        measure.evaluate(small_run.newest(), [task("held-out")], store=False, **more)[0].protocol
        for more in ({}, {"batch_tokens": 64}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "batch_tokens": 64})
    ]
    assert digests[0] == digests[1] and len(set(digests)) == 3
    with pytest.raises(InputError, match="float32 or bfloat16"):
        measure.evaluate(small_run.newest(), [task("held-out")], dtype="float8")


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
