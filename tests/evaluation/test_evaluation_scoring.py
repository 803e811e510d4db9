"""Scores against an independent recomputation, one text at a time and with transformers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cairn.checkpoint.format import read
from cairn.errors import DamagedError, InputError, NotFoundError
from cairn.evaluation.measure import evaluate
from cairn.evaluation.scoring import log_likelihoods

ITEMS = Path(__file__).parent.parent / "conformance" / "choices.jsonl"


@pytest.fixture(scope="module")
def theirs(small_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = small_run.newest().path
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def alone(model, ids, start):
    """Log-probability of ids[start:] by transformers, one text in the batch."""
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logs[position - 1, ids[position]].item() for position in range(start, len(ids)))


@pytest.mark.parametrize("batch_tokens", [1, 64, 8192])
def test_sums_equal_scoring_one_by_one(small_run, theirs, batch_tokens):
    chooser = np.random.default_rng(0)
    sequences = [chooser.integers(0, 256, size).tolist() for size in (2, 31, 5, 17, 1, 8, 8, 25)]
    starts = [1, 20, 4, 1, 1, 7, 2, 25 - 1]
    found = log_likelihoods(small_run.newest().model(), sequences, batch_tokens, starts)
    expected = [alone(theirs[0], ids, start) if len(ids) > 1 else 0.0 for ids, start in zip(sequences, starts, strict=True)]
    assert found == pytest.approx(expected, abs=1e-4)
    assert log_likelihoods(theirs[0], sequences, batch_tokens, starts) == pytest.approx(expected, abs=1e-4)


def test_multiple_choice_equals_an_independent_recomputation_on_20_items(small_run, theirs):
    model, tokenizer = theirs
    items = [json.loads(line) for line in ITEMS.read_text().splitlines()]
    right = {"accuracy": 0, "accuracy_per_byte": 0}
    for item in items:
        sums = []
        for ending in item["endings"]:
            context = [tokenizer.eos_token_id, *tokenizer.encode(item["ctx"])]
            sums.append(alone(model, context + tokenizer.encode(" " + ending), len(context)))
        lengths = [len(" " + ending) for ending in item["endings"]]
        right["accuracy"] += int(np.argmax(sums)) == int(item["label"])
        right["accuracy_per_byte"] += int(np.argmax(np.divide(sums, lengths))) == int(item["label"])
    rows = {row.metric: row for row in evaluate(small_run.newest(), [{"name": "multiple-choice", "path": str(ITEMS)}], store=False)}
    assert len(items) == 20 and {metric: rows[metric].value * rows[metric].n for metric in right} == pytest.approx(right)
    assert rows["accuracy"].chance == pytest.approx(np.mean([1 / len(item["endings"]) for item in items]))


def test_held_out_loss_is_the_mean_of_transformers_losses(small_run, theirs):
    from cairn.training.sources import open_data

    recipe = small_run.recipe
    feed = open_data(recipe.data, recipe.seed, small_run.newest().tokenizer)[1]
    samples = feed.held_out(12)
    with torch.no_grad():
        logs = theirs[0](torch.from_numpy(samples.tokens[:, :-1])).logits.double().log_softmax(-1)
    losses = -logs.gather(-1, torch.from_numpy(samples.tokens[:, 1:])[..., None])[..., 0].numpy()
    expected = (losses * samples.weights).sum() / samples.weights.sum()
    text = sum(1 for token, weight in zip(samples.tokens[:, 1:].ravel(), samples.weights.ravel(), strict=True) if weight and token < 256)
    rows = {row.metric: row.value for row in evaluate(small_run.newest(), [{"name": "held-out", "sequences": 12}], store=False)}
    assert rows["loss"] == pytest.approx(expected, abs=1e-5)
    assert rows["bits_per_byte"] == pytest.approx((losses * samples.weights).sum() / math.log(2) / text, rel=1e-5)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"ctx": "a", "endings": ["b"]}', "no key 'label'"),
        ('{"ctx": "a", "endings": ["b"], "label": 1}', "counted from 0"),
        ('{"ctx": "a", "endings": "b", "label": 0}', "a list of texts"),
        ("[1, 2]", "is not a JSON object"),
        ("{", "is not valid JSON"),
    ],
)
def test_items_that_are_none_are_named_by_their_line(small_run, tmp_path, line, what):
    (tmp_path / "items.jsonl").write_text('{"ctx": "a", "endings": ["b", "c"], "label": 0}\n' + line + "\n")
    with pytest.raises((InputError, DamagedError), match=what) as caught:
        evaluate(small_run.newest(), [{"name": "multiple-choice", "path": str(tmp_path / "items.jsonl")}], store=False)
    assert "line 2" in str(caught.value)


def test_a_file_of_items_is_read_as_every_file_of_rows(tmp_path):
    import gzip

    from cairn.evaluation import items, rows

    line = '{"ctx": "one\u2028two", "n": 1}'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(("\ufeff" + line + "\n\n" + line).encode()))
    (tmp_path / "a.json").write_bytes(("\ufeff[" + line + "]").encode())
    assert [row for _, row in rows.read_rows(tmp_path / "a.jsonl.gz", 1)] == items.load(tmp_path / "a.json", ["ctx"])
    assert len(items.load(tmp_path / "a.jsonl.gz", ["n"])) == 2
    for bad, error in (("[" * 100_000, DamagedError), ("[", DamagedError), ("{}", InputError)):
        (tmp_path / "a.json").write_text(bad)
        with pytest.raises(error):
            items.load(tmp_path / "a.json", [])


def test_a_missing_file_of_items_is_said(small_run, tmp_path):
    with pytest.raises(NotFoundError, match=r"nothing\.jsonl"):
        evaluate(small_run.newest(), [{"name": "multiple-choice", "path": str(tmp_path / "nothing.jsonl")}])


def test_results_are_found_under_another_path_and_not_for_other_weights(small_run, tmp_path):
    import shutil

    from cairn.evaluation.results import folder as results_folder

    first = evaluate(small_run.newest(), [{"name": "held-out", "sequences": 8}])
    shutil.copytree(small_run.path, tmp_path / "copy")
    place = results_folder(read.open(tmp_path / "copy"))
    before = {path: path.stat().st_mtime_ns for path in place.iterdir()}
    assert [row.value for row in evaluate(read.open(tmp_path / "copy"), [{"name": "held-out", "sequences": 8}])] == [row.value for row in first]
    assert {path: path.stat().st_mtime_ns for path in place.iterdir()} == before
    other = evaluate(read.open(read.list_checkpoints(tmp_path / "copy")[0]), [{"name": "held-out", "sequences": 8}])
    assert other[0].value != first[0].value and other[0].protocol == first[0].protocol and other[0].digest != first[0].digest
