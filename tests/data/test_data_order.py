"""Order, mixtures and packing: pure functions of the position, exact in their proportions."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn import randomness
from cairn.data.order.feed import Prefetcher
from cairn.data.order.mixture import BLOCK, Mixture
from cairn.data.text import tokenizer, tokens
from cairn.data.text.feed import SourceSpec, TextFeed
from cairn.data.text.packing import Joined, Whole, best_fit
from cairn.data.text.tokens import Split
from cairn.errors import InputError, ResumeError


@settings(max_examples=40)
@given(st.integers(0, 2**62), st.integers(1, 3000))
def test_a_permutation_meets_every_index_once(seed, size):
    assert sorted(randomness.permutation(seed, size, np.arange(size)).tolist()) == list(range(size))


def test_the_generator_is_the_same_for_ever():
    """Figures written down once: a change of them would silently change every run's order."""
    assert randomness.bits(1, [0, 1, 2]).tolist() == [10451216379200822465, 13757245211066428519, 17911839290282890590]  # SplitMix64 from state 1
    assert randomness.permutation(5, 10, np.arange(10)).tolist() == randomness.permutation(5, 10, np.arange(10)[::-1]).tolist()[::-1]
    assert randomness.seed_for(0, "step", 1) != randomness.seed_for(0, "step", "1") != randomness.seed_for(1, "step", 1)


def test_uniform_numbers_are_uniform():
    values = randomness.uniform(3, np.arange(100_000))
    assert values.min() >= 0 and values.max() < 1
    assert np.histogram(values, bins=20, range=(0, 1))[0] == pytest.approx(5000, rel=0.06)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=5), st.integers(0, 3 * BLOCK))
@settings(max_examples=25)
def test_every_moment_of_a_mixture_has_its_proportions(weights, position):
    mixture = Mixture({f"s{i}": weight for i, weight in enumerate(weights)}, seed=1)
    cursor = np.array(list(mixture.cursor(position).values()))
    assert cursor.sum() == position
    assert np.abs(cursor - position * np.array(weights) / sum(weights)).max() <= 2 + position / BLOCK


def test_draws_count_each_source_from_zero_without_a_gap_across_changes_of_the_weights():
    mixture = Mixture({"a": 3, "b": 1}, seed=2)
    mixture.change(1000, {"a": 0, "b": 1})
    mixture.change(1500, {"a": 1, "b": 1})
    sources, draws = mixture.draws(np.arange(2000))
    for source in (0, 1):
        assert draws[sources == source].tolist() == list(range((sources == source).sum()))
    assert (sources[1000:1500] == 1).all() and (sources[:1000] == 0).sum() == pytest.approx(750, abs=2)
    again = Mixture.from_json(json.loads(json.dumps(mixture.to_json())), seed=2)
    assert (again.draws(np.arange(2000))[0] == sources).all() and again.cursor(1700) == mixture.cursor(1700)
    shuffled = np.random.default_rng(0).permutation(2000)
    assert (mixture.draws(shuffled)[1] == draws[shuffled]).all()


def test_the_past_of_a_mixture_can_not_change():
    mixture = Mixture({"a": 1, "b": 1}, seed=0)
    mixture.change(100, {"a": 1, "b": 2})
    with pytest.raises(InputError, match="lies before"):
        mixture.change(50, {"a": 1, "b": 1})
    for bad in ({"a": 1}, {"a": -1, "b": 2}, {"a": 0, "b": 0}):
        with pytest.raises(InputError):
            mixture.change(200, bad)


def test_a_change_before_one_that_is_planned_holds_until_it():
    planned = Mixture({"a": 1, "b": 1}, seed=0)
    planned.change(300, {"a": 0, "b": 1})
    both = planned.changed(100, {"a": 1, "b": 0})
    sources, draws = both.draws(np.arange(400))
    assert (sources[100:300] == 0).all() and (sources[300:] == 1).all()
    assert (sources[:100] == planned.draws(np.arange(100))[0]).all() and planned.to_json() == [[0, {"a": 1.0, "b": 1.0}], [300, {"a": 0.0, "b": 1.0}]]
    assert all(draws[sources == source].tolist() == list(range((sources == source).sum())) for source in (0, 1))
    assert both.until(299).to_json() == both.to_json()[:2] and both.weights_at(299) == {"a": 1.0, "b": 0.0}
    assert both.changed(300, {"a": 1, "b": 1}).to_json()[2] == [300, {"a": 1.0, "b": 1.0}], "at the very moment the later word counts"
    with pytest.raises(InputError, match="sources are fixed"):
        both.changed(0, {"a": 1})


def test_many_changes_are_counted_once_and_copies_know_what_was_counted(monkeypatch):
    mixture = Mixture({"a": 1, "b": 1}, seed=4)
    for i in range(1, 40):
        mixture.change(i * 50, {"a": 1 + i % 3, "b": 1})
    whole = mixture.draws(np.arange(2000))
    assert all(whole[1][whole[0] == s].tolist() == list(range((whole[0] == s).sum())) for s in (0, 1))
    fresh = Mixture.from_json(mixture.to_json(), seed=4)
    assert fresh.cursor(1999) == mixture.cursor(1999) and fresh.cursor(0) == {"a": 0, "b": 0}
    counted = []
    honest = Mixture._block
    monkeypatch.setattr(Mixture, "_block", lambda self, segment, block: counted.append(segment) or honest(self, segment, block))
    later = mixture.changed(1990, {"a": 5, "b": 1})
    assert (later.draws(np.arange(1980, 1990))[1] == whole[1][1980:1990]).all() and set(counted) == {39}
    assert later.cursor(1990) == mixture.cursor(1990) and later.cursor(2000) != mixture.cursor(2000)


def stream(lengths: list[int]) -> Split:
    """Documents of these lengths: an end-of-text 0, then 1, 2, 3 ... through all documents."""
    starts = np.cumsum([0, *lengths[:-1]]).astype(np.uint64)
    values = np.arange(1, sum(lengths) + 1)
    values[starts.astype(int)] = 0
    return Split(values, starts, 0)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 12))
def test_joined_windows_make_every_token_a_target_once(lengths, length):
    split = stream(lengths)
    packed = Joined(split, length)
    windows = packed.windows(np.arange(packed.count))
    targets = windows.tokens[:, 1:].reshape(-1)
    assert targets.tolist() == split.tokens[1 : 1 + len(targets)].tolist() and len(split.tokens) - 1 - len(targets) < length
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for row, number in zip(windows.documents, range(packed.count), strict=True):
        assert (np.diff(row) == np.diff(owner[number * length : number * length + length + 1])).all()


@settings(max_examples=50)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(2, 12))
def test_whole_windows_hold_every_token_once_and_cut_only_what_is_too_long(lengths, length):
    split = stream(lengths)
    packed = Whole(split, length, padding=0)
    windows = packed.windows(np.arange(packed.count))
    held = windows.tokens[windows.documents >= 0]
    assert sorted(held.tolist()) == sorted(split.tokens.tolist())
    for tokens_, documents, weights in zip(windows.tokens, windows.documents, windows.weights, strict=True):
        for place in np.flatnonzero(weights):
            if documents[place] == documents[place + 1]:
                assert tokens_[place + 1] == tokens_[place] + 1 or tokens_[place] == 0
            else:
                assert tokens_[place + 1] == 0, "the only target outside a document is the end of it"


@settings(max_examples=50)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_best_fit_never_overfills_and_is_near_the_least(lengths):
    bins = best_fit(np.array(lengths), 20)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= 20 for b in bins)
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // 20) + max(4, len(lengths) // 2)


@pytest.fixture(scope="module")
def feed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("feed")
    specs = []
    for name, count, weight in (("a", 40, 2.0), ("b", 15, 1.0)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name} document {i} " * (3 + i % 5)}) + "\n" for i in range(count)))
        specs.append(SourceSpec(name, tokens.prepare(str(path), tokenizer.byte_level(), folder / f"{name}-store", held_out=0.2), weight))
    return lambda **options: TextFeed(specs, 16, seed=3, **options)


def test_what_stands_at_a_position_does_not_depend_on_who_asks_or_how(feed):
    whole = feed().samples(np.arange(64))
    other = feed()
    pieces = [other.samples(np.arange(begin, begin + 8)) for begin in reversed(range(0, 64, 8))]
    assert (np.concatenate([p.tokens for p in reversed(pieces)]) == whole.tokens).all()
    single = np.concatenate([feed().samples(np.array([i])).window for i in range(64)])
    assert (single == whole.window).all()


def test_an_epoch_holds_every_window_once_and_the_next_has_another_order(feed):
    one = feed()
    size = one._train[1].count
    samples = one.samples(np.arange(12 * size))
    mine = samples.window[samples.source == 1]
    first, second = mine[:size], mine[size : 2 * size]
    assert sorted(first) == sorted(second) == list(range(size)) and (first != second).any()


def test_masked_documents_are_numbered_and_attending_ones_are_not(feed):
    assert feed().samples(np.arange(2)).documents is None
    documents = feed(documents="mask").samples(np.arange(20)).documents
    assert documents.shape == (20, 17) and documents.max() > 0
    assert feed(packing="whole").samples(np.arange(2)).documents is not None


def test_held_out_windows_are_fixed_and_never_trained_on(feed):
    one = feed()
    held = one.held_out(10)
    assert (held.tokens == feed().held_out(10).tokens).all()
    trained = {t.tobytes() for t in one.samples(np.arange(300)).tokens}
    assert not trained & {t.tobytes() for t in held.tokens}


def test_a_run_refuses_to_go_on_with_other_data(feed, tmp_path):
    state = json.loads(json.dumps(feed().state(37)))
    feed().restore(state)
    state["stores"]["a"] = "0" * 64
    with pytest.raises(ResumeError, match="'a' has other contents"):
        feed().restore(state)


def test_the_prefetcher_keeps_order_and_hands_errors_on():
    with Prefetcher(range(20), lambda i: i * i) as results:
        assert list(results) == [i * i for i in range(20)]
    with pytest.raises(ZeroDivisionError), Prefetcher(range(3), lambda i: 1 // (1 - i)) as results:
        list(results)
    with Prefetcher(range(10**9), lambda i: i) as results:
        assert next(iter(results)) == 0


def test_the_order_in_which_sources_are_listed_decides_nothing(feed):
    one = feed()
    other = TextFeed(list(reversed(one.sources)), 16, seed=3)
    assert (one.samples(np.arange(50)).tokens == other.samples(np.arange(50)).tokens).all()
    assert one.state(50) == other.state(50)
