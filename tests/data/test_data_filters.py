"""The filter of repeated patterns against a scan that looks at every place, and what it does to a feed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.checkpoint.format import read
from cairn.data.filters.repeats import RepeatFilter, repeated
from cairn.data.text.feed import SourceSpec, TextFeed
from cairn.data.text.tokenizer import resolve_tokenizer
from cairn.data.text.tokens import prepare
from cairn.training.run import train


def scanned(row: list[int], longest: int, times: int) -> bool:
    """Every place and every period, copy by copy."""
    for begin in range(len(row)):
        for period in range(1, longest + 1):
            pattern, copies = row[begin : begin + period], 0
            while len(pattern) == period and row[begin + copies * period : begin + (copies + 1) * period] == pattern:
                copies += 1
            if copies >= times:
                return True
    return False


@st.composite
def planted(draw):
    """A row of tokens from a small alphabet with a pattern of 1 to 15 tokens planted 3 to 40 times, or none."""
    size = draw(st.integers(1, 200))
    row = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, draw(st.sampled_from([2, 5, 1000])), size)
    period, copies = draw(st.integers(1, 15)), draw(st.integers(3, 40))
    pattern = np.arange(period) + draw(st.sampled_from([0, 5000]))
    begin = draw(st.integers(0, size))
    return np.concatenate([row[:begin], np.tile(pattern, copies)[: draw(st.integers(0, period * copies))], row[begin:]])


@given(planted(), st.integers(1, 14), st.integers(2, 33))
@settings(max_examples=500)
def test_it_finds_what_a_scan_of_every_place_finds(row, longest, times):
    assert repeated(row[None], longest, times)[0] == scanned(row.tolist(), longest, times)


@pytest.mark.parametrize("period", [1, 2, 7, 13])
def test_thirty_two_copies_are_too_many_and_thirty_one_are_not(period):
    def row(copies: int, period: int = period) -> np.ndarray:
        return np.concatenate([np.arange(100, 400), np.tile(np.arange(period), copies), np.arange(400, 700)])

    rows = [row(31), row(32), row(33)]
    assert [bool(RepeatFilter().keeps(each[None])[0]) for each in rows] == [True, False, False]
    assert RepeatFilter().keeps(row(40, 14)[None])[0], "patterns of more than 13 tokens are not looked for"


GOOD = "number {} of the good documents, with nothing in it that is said many times over"


def prepared(texts, folder):
    folder.mkdir()
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return prepare(str(folder / "t.jsonl"), resolve_tokenizer("byte", []), folder / "store", held_out=0.0)


@pytest.fixture
def store(tmp_path):
    """Half of the documents are two letters many times."""
    return prepared(["ab" * 50 if i % 2 else GOOD.format(i) for i in range(60)], tmp_path / "mixed")


@pytest.mark.parametrize("packing", ["joined", "whole"])
def test_a_feed_gives_what_is_left_out_the_weight_zero_and_changes_nothing_else(store, packing):
    plain, filtered = (TextFeed([SourceSpec("t", store)], 100, 3, packing=packing, filters=filters) for filters in ([], [RepeatFilter()]))
    before, after = (feed.samples(np.arange(40)) for feed in (plain, filtered))
    assert (before.tokens == after.tokens).all() and (before.window == after.window).all()
    left_out = np.array([scanned(row.tolist(), 13, 32) for row in before.distinct()])
    assert 0 < left_out.sum() < 40
    assert (after.weights[left_out] == 0).all() and (after.weights[~left_out] == before.weights[~left_out]).all()
    alone = [filtered.samples(np.array([position])).weights[0] for position in range(40)]
    assert (np.stack(alone) == after.weights).all(), "what else is asked for at once decides nothing"


def test_padding_is_no_repetition(tmp_path):
    feed = TextFeed([SourceSpec("t", prepared(map(GOOD.format, range(20)), tmp_path / "good"))], 120, 3, packing="whole", filters=[RepeatFilter()])
    samples = feed.samples(np.arange(20))
    assert repeated(samples.tokens, 13, 32).any(), "a window ends with so much padding"
    assert (samples.weights.sum(axis=1) > 0).all()


def test_evaluation_is_not_filtered(store):
    feed = TextFeed([SourceSpec("t", store)], 100, 3, filters=[RepeatFilter()])
    assert (feed.evenly(20, "train").weights == 1).all()


@pytest.mark.parametrize("objective", ["causal-lm", "span-corruption"])
def test_a_batch_of_which_nothing_is_left_changes_nothing_under_any_objective(small_recipe, tmp_path, objective):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": "ab" * 400 + f"{i}"}) + "\n" for i in range(20)))
    recipe = small_recipe | {"data": small_recipe["data"] | {"sources": {"t": {"corpus": str(tmp_path / "t.jsonl")}}}, "objective": objective}
    changes = ["data.filters=[{name: repeats, times: 4}]", "training.tokens=3 steps", "checkpoint.first=true", "training.batch=32"]
    run = train(recipe, tmp_path / "r", changes)
    empty = [row["step"] for row in run.metrics() if row["grad_norm"] == 0]
    assert empty == [1, 2, 3] and run.newest().model_digest == read.open(run.checkpoints()[0]).model_digest
