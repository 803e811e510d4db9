"""Which tokens are hidden: exact counts, the laws they are drawn by, and texts that come back whole."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.data.text import denoising
from cairn.data.text.denoising import Denoiser, Example
from cairn.errors import InputError
from cairn.randomness import bits

SENTINEL, END = 999, 500
KEYS = st.integers(0, 2**64 - 1)
LENGTHS, RATES, MEANS = st.integers(2, 700), st.floats(0.01, 0.99), st.floats(1, 64)


def text(length: int, key: int = 0) -> np.ndarray:
    return (bits(key % 2**63, np.arange(length)) % np.uint64(400)).astype(np.int64)


def runs(mask: np.ndarray) -> int:
    return int((np.diff(mask.astype(int)) == 1).sum())


@given(LENGTHS, RATES, MEANS, KEYS)
@settings(max_examples=1000)
def test_a_mask_has_the_counts_of_the_reference_and_the_text_comes_back(length: int, rate: float, mean: float, key: int) -> None:
    mask = denoising.noise_mask(length, rate, mean, key)
    hidden = int(np.clip(np.round(length * rate), 1, length - 1))
    spans = int(min(max(np.round(hidden / mean), 1), hidden, length - hidden))
    assert len(mask) == length and mask.sum() == hidden and runs(mask) == spans
    assert not mask[0] and mask[-1]
    tokens = text(length, key)
    inputs, targets = denoising.corrupted(tokens, mask, SENTINEL)
    assert len(inputs) == length - hidden + spans and len(targets) == hidden + spans
    for part in (inputs, targets):
        assert part[part > 400].tolist() == list(range(SENTINEL, SENTINEL - spans, -1))
    assert targets[0] == SENTINEL and inputs[-1] == SENTINEL - spans + 1
    assert (denoising.restored(inputs, targets, SENTINEL, spans) == tokens).all()


@given(LENGTHS, RATES, MEANS, KEYS)
@settings(max_examples=200)
def test_a_mask_is_a_function_of_its_key(length: int, rate: float, mean: float, key: int) -> None:
    assert (denoising.noise_mask(length, rate, mean, key) == denoising.noise_mask(length, rate, mean, key)).all()


def test_rounding_is_half_to_even() -> None:
    assert denoising.counts(10, 0.25, 1)[0] == 2 and denoising.counts(14, 0.25, 1)[0] == 4
    assert denoising.counts(20, 0.25, 2)[1] == 2  # 5 hidden: 2.5 spans


@pytest.mark.parametrize(
    ("inputs", "rate", "mean", "found"),
    [
        (512, 0.15, 3, (568, 114)),
        (512, 0.15, 8, (588, 100)),
        (512, 0.5, 3, (766, 512)),
        (512, 0.5, 8, (908, 512)),
        (512, 0.15, 64, (600, 92)),
        (512, 0.5, 64, (1006, 512)),
        (128, 0.15, 3, (141, 29)),
        (128, 0.5, 3, (190, 128)),
    ],
)
def test_lengths_that_leave_no_padding(inputs: int, rate: float, mean: float, found: tuple[int, int]) -> None:
    assert denoising.lengths(inputs, rate, mean) == found


@given(st.integers(8, 900), RATES, st.floats(1, 40))
@settings(max_examples=300)
def test_a_text_fills_its_room_and_never_more(room: int, rate: float, mean: float) -> None:
    length = denoising.longest_text(room, rate, mean)
    hidden, spans = denoising.counts(length, rate, mean)
    assert (length - hidden + spans + 1) + (hidden + spans + 1) <= room
    assert room - length - 2 * spans - 2 <= 4  # one more token of text may take up to two more sentinels
    assert denoising.longest_text(626, 0.15, 3) == 568  # 512 + 114: "What Language Model Architecture ..."


def test_too_little_room_is_refused() -> None:
    with pytest.raises(InputError, match=r"lengthen data\.sequence_length"):
        denoising.longest_text(5, 0.15, 3)


def test_all_compositions_are_equally_likely() -> None:
    stats = pytest.importorskip("scipy.stats")
    every = [cuts for cuts in itertools.product(range(1, 8), repeat=3) if sum(cuts) == 8]
    drawn = [tuple(denoising.composition(8, 3, key, denoising.NOISE).tolist()) for key in bits(5, np.arange(6000)).tolist()]
    assert stats.chisquare([drawn.count(cuts) for cuts in every]).pvalue > 0.001
    assert set(drawn) == set(every)


def test_kept_and_hidden_pieces_are_drawn_apart() -> None:
    stats = pytest.importorskip("scipy.stats")
    masks = [denoising.noise_mask(8, 0.5, 2, key) for key in bits(6, np.arange(3000)).tolist()]  # two pieces of four tokens on each side
    pairs = [(int(np.argmax(mask)), int(mask.sum() - mask[::-1].argmin())) for mask in masks]
    table = np.array([[pairs.count((kept, hidden)) for hidden in sorted({b for _, b in pairs})] for kept in (1, 2, 3)])
    assert table.shape == (3, 3) and stats.chi2_contingency(table).pvalue > 0.001


def test_a_split_is_anywhere_with_something_on_both_sides() -> None:
    stats = pytest.importorskip("scipy.stats")
    drawn = [denoising.split_point(12, key) for key in bits(3, np.arange(5000)).tolist()]
    assert stats.chisquare([drawn.count(n) for n in range(1, 12)]).pvalue > 0.001 and set(drawn) == set(range(1, 12))
    assert denoising.split_point(100, 0, 0.25) == 75


def test_a_mixture_has_its_shares() -> None:
    stats = pytest.importorskip("scipy.stats")
    table = [Denoiser(weight=1), Denoiser(weight=2), Denoiser(span=None, weight=5)]
    drawn = [denoising.chosen(table, key) for key in bits(4, np.arange(8000)).tolist()]
    assert stats.chisquare([drawn.count(n) for n in range(3)], [1000, 2000, 5000]).pvalue > 0.001


@given(st.integers(1, 400), st.floats(0.01, 0.99), KEYS)
@settings(max_examples=200)
def test_masked_tokens_are_as_many_as_asked_for_and_the_others_stay(length: int, rate: float, key: int) -> None:
    tokens = text(length, key)
    read, asked = denoising.masked(tokens, rate, key, 777, (0, 400))
    assert asked.sum() == np.clip(np.round(length * rate), 1, length) and (read[~asked] == tokens[~asked]).all()


def test_masked_tokens_are_hidden_in_the_shares_of_bert() -> None:
    stats = pytest.importorskip("scipy.stats")
    tokens = np.full(20_000, 1000)
    read, asked = denoising.masked(tokens, 0.5, 11, 777, (3, 10))
    kinds = [(read[asked] == 777).sum(), ((read[asked] >= 3) & (read[asked] < 10)).sum(), (read[asked] == 1000).sum()]
    assert sum(kinds) == 10_000 and stats.chisquare(kinds, [8000, 1000, 1000]).pvalue > 0.001
    assert stats.chisquare(np.bincount(read[read < 10], minlength=10)[3:]).pvalue > 0.001


ROWS = st.sampled_from(
    [Denoiser(), Denoiser(rate=0.5, span=8, mode="[X]"), Denoiser(rate=0.15, span=64), Denoiser(span=None), Denoiser(span=None, split="fixed", mode="[S]")]
)


@given(ROWS, st.integers(24, 300), KEYS)
@settings(max_examples=300)
def test_one_window_and_two_rows_say_the_same(row: Denoiser, room: int, key: int) -> None:
    window = text(room + 1, key)
    one = row.example(window, key, SENTINEL, {"[X]": 701, "[S]": 702}, room)
    row_arrays, sizes = denoising.one_window([one], room, END), row.sizes(room)
    pair = denoising.two_rows([one], sizes, END, END)
    prefix, asked = int(row_arrays["prefix"][0]), row_arrays["weights"][0] > 0
    said = pair["targets"][0][pair["weights"][0] > 0]
    assert (row_arrays["targets"][0][asked] == said).all() and asked[prefix - 1] and not asked[: prefix - 1].any()
    assert row_arrays["input_ids"][0, 0] == END  # a decoder begins with an end, as everywhere
    assert (row_arrays["input_ids"][0, 1:] == row_arrays["targets"][0, :-1]).all()
    read = pair["input_ids"][0, : int(pair["lengths"][0])]
    assert read[-1] == END and (row_arrays["input_ids"][0, 1 : 1 + len(one.inputs)] == one.inputs).all() and (read[:-1] == one.inputs).all()
    assert pair["decoder_input_ids"][0, 0] == END and (pair["decoder_input_ids"][0, 1 : len(said)] == said[:-1]).all()
    assert (row.mode is not None) == (one.inputs[0] in (701, 702))
    if row.span is not None:
        body = one.inputs[row.mode is not None :]
        back = denoising.restored(body, one.targets, SENTINEL, 200)
        assert any((window[at : at + len(back)] == back).all() for at in range(len(window) - len(back) + 1))
        assert len(read) <= sizes[0] and len(said) == sizes[1]


def test_what_does_not_count_weighs_nothing() -> None:
    one = Example(np.array([1, 2]), np.array([3, 4]), counted=np.array([True, False, False]))
    assert denoising.one_window([one], 8, END)["weights"].tolist() == [[0, 0, 0, 1, 0, 0, 0, 0]]
    assert denoising.two_rows([one], (3, 3), END, END)["weights"].tolist() == [[1, 0, 0]]
