"""Every measurement keeps what the public suite asks of it; every option is run with another value than the default; what breaks a promise is found out."""

import math
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist

from cairn import catalog
from cairn.errors import InputError
from cairn.evaluation import measure
from cairn.evaluation.measure import Measurement
from cairn.evaluation.results import Score
from cairn.options import configure
from cairn.testing import check_method, checks
from cairn.testing.measurements import PROCESSES, in_processes, passes, subject_for

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
    "tag-accuracy": [{"samples": 5}, {"split": "train"}, {"by_source": True}, {"batch": 3}],
    "elbo": [{"samples": 5}, {"split": "train"}, {"draws": 2}, {"seed": 1}, {"batch": 3}],
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


CHECKS = [check for name in NAMES for check in checks("measurement", name, OPTIONS.get(name, {})) if check.promise != PROCESSES]
"""Without the launches of two processes for each: all measurements of a field share one below."""
RUNS = {"accuracy": "image_run", "elbo": "drawing_run", "tag-accuracy": "word_run"}


@pytest.fixture
def subject(name, request):
    """A finished run of a model that the measurement measures."""
    return request.getfixturevalue(RUNS.get(name, "small_run"))


@pytest.fixture(autouse=True)
def data(request):
    if any(name in request.node.name for name in ("blimp", "gsm8k", "instruction")):
        request.getfixturevalue("real_data")


def test_every_measurement_stands_here_with_every_option_of_its_own():
    """A new measurement, or a new option, has no place to hide: it is run with another value than the default."""
    assert set(OPTIONS) | set(RUNS) == set(NAMES) == set(OTHER)
    for name in NAMES:
        fields = set(catalog.get("measurement", name).implementation.model_fields)
        tried = {key for options in OTHER[name] for key in options}
        assert tried <= fields and fields - tried <= KEYS, f"{name}: no other value of {fields - tried - KEYS} is tried"


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_every_measurement_keeps_every_promise(check, tmp_path):
    check(tmp_path)


@pytest.mark.parametrize("reads", sorted({catalog.get("measurement", name).implementation.reads for name in NAMES}))
def test_two_processes_find_what_one_finds(reads, tmp_path, real_data):
    """All measurements of what a model reads in one launch."""
    members = [name for name in NAMES if catalog.get("measurement", name).implementation.reads == reads and name != "elbo"]
    subject = subject_for(catalog.get("measurement", members[0]).implementation)
    tasks = [task(name) for name in members]
    one = measure.evaluate(subject, tasks, store=False, device="cpu")
    for rows in in_processes(subject.path, tasks, tmp_path / "ranks"):
        assert [(row["task"], row["metric"]) for row in rows] == [(row.task, row.metric) for row in one]
        assert [row["value"] for row in rows] == pytest.approx([row.value for row in one], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("accuracy", "batch"),
        ("elbo", "batch"),
        ("tag-accuracy", "batch"),
        ("blimp", "batch_tokens"),
        ("held-out", "batch"),
        ("activation-statistics", "micro_batch"),
    ],
)
def test_its_own_option_of_speed_is_obeyed(name, key, subject):
    with passes() as seen:
        measure.evaluate(subject.newest(), [task(name)], store=False)
        together = len(seen)
        seen.clear()
        measure.evaluate(subject.newest(), [task(name, **{key: 1})], store=False)
    assert len(seen) > together


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


class Plain(Measurement):
    """How large the model's parameters are, and what it says of one text."""

    batch: int = 8
    one_at_a_time: ClassVar[dict[str, int]] = {"batch": 1}

    def protocol(self, feed=None):
        return {key: value for key, value in super().protocol(feed).items() if key != "batch"}

    def of(self, model, preprocessor, feed=None):
        ids = torch.arange(64).view(8, 8)
        with torch.no_grad():
            said = torch.cat([model(part).logits for part in ids.split(self.batch)])
        return [Score("plain", "mean", self.figure(said), 0.0, len(ids))]

    def figure(self, said):
        return float(said.double().mean())


class Random(Plain):
    """Another figure each time."""

    def figure(self, said):
        return float(torch.rand(()))


class Sticky(Plain):
    """A figure that depends on the size of its batches."""

    def figure(self, said):
        return float(said.double().mean()) + self.batch


class Greedy(Plain):
    """Always all at once."""

    one_at_a_time: ClassVar[dict[str, int]] = {}


class Loud(Plain):
    """Its protocol tells the size of its batches."""

    def protocol(self, feed=None):
        return Measurement.protocol(self, feed)


class Empty(Plain):
    """No figure at all."""

    def of(self, model, preprocessor, feed=None):
        return []


class Mute(Plain):
    """Its protocol does not tell one option from another."""

    louder: bool = False

    def protocol(self, feed=None):
        return {key: value for key, value in super().protocol(feed).items() if key != "louder"}


class Lonely(Plain):
    """Each of several processes has a figure of its own."""

    def figure(self, said):
        return float(dist.get_rank()) if dist.is_initialized() else 0.0


@pytest.fixture
def registered():
    """Register a class for one test, and take it out again."""
    entered = []

    def enter(implementation):
        catalog.register("measurement", "on-trial")(implementation)
        entered.append(implementation)

    yield enter
    for implementation in entered:
        del catalog._entries["measurement", "on-trial"], catalog._classes["measurement", "on-trial"], catalog._names[implementation]


def test_a_fair_measurement_of_somebody_else_passes(registered):
    registered(Plain)
    assert len(check_method("measurement", "on-trial")) == 5


@pytest.mark.parametrize(
    ("implementation", "words"),
    [
        (Random, "measured twice, it gives two figures"),
        (Sticky, "one at a time it finds"),
        (Greedy, "it passes 8 at once"),
        (Loud, "under another protocol"),
        (Empty, "gives no figure"),
        (Mute, "does not tell it from the default"),
        (Lonely, "process 1 of two finds"),
    ],
)
def test_a_measurement_that_breaks_a_promise_is_found_out(implementation, words, registered, tmp_path):
    registered(implementation)
    tried = [check for check in checks("measurement", "on-trial") if check.promise != PROCESSES or implementation is Lonely]
    with pytest.raises(AssertionError, match=words):
        for number, check in enumerate(tried):
            (tmp_path / str(number)).mkdir()
            check(tmp_path / str(number))
