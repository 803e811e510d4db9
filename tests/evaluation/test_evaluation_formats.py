"""Prompt formats: the grammar exactly, the search against planted tables, and a spread that noise does not make."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.data.text.tokenizer import byte_level
from cairn.errors import InputError
from cairn.evaluation import grammar
from cairn.evaluation.audits.spread import equal_shares, order_flip, slot_effects, spread_of, thompson
from cairn.evaluation.grammar import Enumeration, PromptFormat
from cairn.evaluation.items import greedy_matches
from cairn.evaluation.measurements.formats import Formats
from cairn.statistics import bootstrap

ALL = list(grammar.every())


def test_the_plain_formats_are_all_that_the_rules_leave():
    """Counted by hand: 10 separators without a line break go with 14 spaces, 4 with one go with 5; 4 casings each."""
    assert len(ALL) == len(set(ALL)) == (10 * 14 + 4 * 5) * 4
    every = [PromptFormat(*values) for values in itertools.product(grammar.SEPARATORS, grammar.SPACES, grammar.CASINGS)]
    assert {each for each in every if each.breach() is None} == set(ALL) and len(every) == 15 * 15 * 4


def test_what_is_drawn_is_valid_distinct_and_the_same_each_time():
    drawn = grammar.sample(500, seed=1, enumerated=True)
    assert len(set(drawn)) == 500 and all(each.breach() is None for each in drawn)
    assert drawn == grammar.sample(500, seed=1, enumerated=True) != grammar.sample(500, seed=2, enumerated=True)
    assert set(grammar.sample(5000)) == set(ALL)


@pytest.mark.parametrize(
    ("format_", "rule"),
    [
        (PromptFormat(separator=""), "a field needs a separator"),
        (PromptFormat(space=""), "fields with text need a space"),
        (PromptFormat(separator="\n\t", space=" "), "a line break inside a field"),
        (PromptFormat(enumeration=Enumeration(space="")), "options need a space"),
        (PromptFormat(enumeration=Enumeration(separator="\n ", space=" ")), "a line break inside an option"),
        (PromptFormat(space=" ", enumeration=Enumeration(space="\n")), "a line break between options"),
    ],
)
def test_each_rule_is_named(format_, rule):
    assert rule in format_.breach()


@settings(max_examples=200)
@given(st.sampled_from(ALL), st.lists(st.text("abcdefgh", max_size=6), min_size=2, max_size=2))
def test_a_prompt_gives_its_fields_back(format_, texts):
    names = ["Passage", "Answer"]
    prompt = format_.written(list(zip(names, texts, strict=True)))
    assert format_.parsed(prompt, names) == texts
    with pytest.raises(InputError):
        format_.parsed(prompt, ["Nothing", "Answer"])


def test_an_example_by_hand():
    enumeration = Enumeration(space="; \n", option_separator=" ", wrap="({})", number="I", separator=": ")
    format_ = PromptFormat(separator=" - ", space="\n", casing="upper", enumeration=enumeration)
    assert format_.written([("Word", "a"), ("Option", ["b", "c"]), ("Answer", "")]) == "WORD - a\nOPTION (I): b; \nOPTION (II): c\nANSWER - "


@pytest.mark.parametrize("number", grammar.NUMBERS)
def test_labels_are_a_bijection(number):
    labels = [Enumeration(number=number).label(place) for place in range(grammar.MOST_OPTIONS)]
    assert len(set(labels)) == grammar.MOST_OPTIONS


def table(seed, formats=64, items=1000):
    chooser = np.random.default_rng(seed)
    chances = chooser.beta(8, 4, formats)
    return (chooser.random((formats, items)) < chances[:, None]).astype(float)


def test_the_search_finds_both_ends_of_planted_tables_better_than_equal_shares():
    ours, theirs = [], []
    for seed in range(50):
        outcomes = table(seed)
        means, looked = outcomes.mean(axis=1), []

        def pull(row, begin, end, outcomes=outcomes, looked=looked):
            looked.append(end - begin)
            return outcomes[row, begin:end]

        found = thompson(pull, 64, 1000, 8000, default=float(means[0]), seed=seed)
        assert found.calls == sum(looked) <= 8000
        true = means.max() - means.min()
        ours.append(abs(means[found.high] - means[found.low] - true))
        equal = equal_shares(pull, 64, 1000, 8000)
        theirs.append(abs(means[equal.high] - means[equal.low] - true))
    assert np.mean(ours) <= 0.02
    difference = np.array(theirs) - np.array(ours)
    low, _ = bootstrap(lambda pick: float(difference[pick].mean()), 50, draws=2000)
    assert low > 0


def test_a_perfect_default_does_not_divide_by_zero():
    assert thompson(lambda row, begin, end: np.ones(end - begin), 4, 10, 40, default=1.0).calls <= 40


def test_where_formats_do_not_differ_the_spread_is_that_of_noise():
    inside, held_out = 0, []
    for seed in range(20):
        outcomes = (np.random.default_rng(seed).random((48, 100)) < 0.6).astype(float)
        spread = spread_of(outcomes, seed, draws=100)
        assert spread.spread > 0.1, "largest minus smallest of noise is never 0"
        inside += spread.excess[0] <= 0 <= spread.excess[1]
        held_out.append(spread.held_out)
    assert inside >= 18 and abs(np.mean(held_out)) < 0.03


def test_where_formats_differ_the_spread_stands_out():
    outcomes = np.concatenate([np.ones((10, 80)), np.zeros((10, 80))])
    outcomes[:, :8] = 1
    spread = spread_of(outcomes, draws=100)
    assert (spread.low, spread.high) == (0.1, 1.0) and spread.p < 0.02 and spread.excess[0] > 0.5 and spread.held_out == pytest.approx(0.9)


def test_the_effect_of_a_part_is_found_apart_from_the_others():
    formats = grammar.sample(60, seed=4)
    means = [0.5 + 0.2 * (each.casing == "upper") for each in formats]
    effects = slot_effects(formats, means)
    assert effects["casing"]["upper"] - effects["casing"]["lower"] == pytest.approx(0.2, abs=1e-9)
    assert max(abs(value) for slot in ("separator", "space") for value in effects[slot].values()) < 1e-9


def test_the_order_of_two_checkpoints_flips_in_as_many_formats_as_it_does():
    a, b = np.zeros((10, 50)), np.zeros((10, 50))
    a[:7, :30], b[7:, :30] = 1, 1
    found = order_flip(a, b)
    assert found["flip"] == pytest.approx(0.3) and found["default_gap"] == pytest.approx(0.6) and np.isnan([found["low"], found["high"]]).all()
    assert order_flip(a, a)["flip"] == 0.5, "a tie is half a flip"
    drawn = np.random.default_rng(0)
    found = order_flip(drawn.random((10, 50)) < np.linspace(0.3, 0.7, 10)[:, None], drawn.random((10, 50)) < 0.5)
    assert found["low"] <= found["flip"] <= found["high"]


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps({"input": word, "output": word[0]}) + "\n" for word in ("stone", "rain", "way", "trail", "marks", "before")))
    return path


def test_greedy_matches_are_what_generation_writes(small_run):
    from cairn.generation.sample import generate

    model, tokenizer = small_run.newest().model(), byte_level()
    prompts = [tokenizer.encode(text) for text in ("the ", "stone m", "and a", "r")]
    written = [generate(model, ids, max_new_tokens=5, temperature=0) for ids in prompts]
    starts = [len(ids) for ids in prompts]
    for batch in (1, 8192):
        assert greedy_matches(model, [a + b for a, b in zip(prompts, written, strict=True)], starts, batch) == [True] * 4
    wrong = [a + b[:-1] + [b[-1] ^ 1] for a, b in zip(prompts, written, strict=True)]
    assert greedy_matches(model, wrong, starts) == [False] * 4


def test_a_budget_is_kept_and_both_ends_are_scored_in_full(small_run, words):
    model, tokenizer = small_run.newest().model(), byte_level()
    whole = Formats(path=words, formats=8, score="rank").look(model, tokenizer)
    some = Formats(path=words, formats=8, score="rank", budget=12, batch=2)
    seen = some.look(model, tokenizer)
    table_, full = np.array(seen["outcomes"], float), np.array(whole["outcomes"], float)
    looked = ~np.isnan(table_)
    assert (table_[looked] == full[looked]).all() and looked.sum() <= 12 + 3 * 6 and looked[0].all()
    assert looked[seen["found"]["low"]].all() and looked[seen["found"]["high"]].all()
    assert some.judge(seen)["by_slot"] is None and len(Formats(path=words, formats=8).judge(whole)["by_slot"]["casing"]) > 1


def test_ranking_is_the_full_log_probability_of_each_label(small_run, words):
    """Recomputed label by label in the first format."""
    from cairn.evaluation.scoring import log_likelihoods

    model, tokenizer = small_run.newest().model(), byte_level()
    seen = Formats(path=words, formats=2, score="rank").look(model, tokenizer)
    labels = sorted({"s", "r", "w", "t", "m", "b"})
    for word, outcome in zip(("stone", "rain", "way", "trail", "marks", "before"), seen["outcomes"][0], strict=True):
        prompt = [tokenizer.eos_id, *tokenizer.encode(f"Input: {word}\nOutput: ")]
        sums = log_likelihoods(model, [prompt + tokenizer.encode(label) for label in labels], starts=[len(prompt)] * len(labels))
        assert outcome == int(labels[int(np.argmax(sums))] == word[0])
