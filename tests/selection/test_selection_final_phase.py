"""Upsampling arithmetic, and the value of sources by a last phase without each."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn.errors import InputError
from cairn.selection.final_phase import ablate_sources, by_size, passes, upsampled, without
from cairn.training.run import train

SIZES = {"web": 10**9, "docs": 50_000, "maths": 20_000, "code": 40_000}
BASE = {"web": 0.8, "docs": 0.1, "maths": 0.05, "code": 0.05}


def test_factors_hold_up_to_the_cap_and_the_rest_goes_to_the_others():
    up = upsampled(BASE, {"docs": 4, "maths": 6, "code": 3}, SIZES, 400_000)
    assert up == pytest.approx({"docs": 0.4, "maths": 0.2, "code": 0.15, "web": 0.25})
    assert passes(up, SIZES, 400_000)["maths"] == pytest.approx(4), "6 x would be 6 passes"


@given(st.dictionaries(st.sampled_from(["docs", "maths", "code"]), st.floats(1, 6), min_size=1), st.integers(10_000, 10**7))
def test_shares_sum_to_one_and_no_cap_is_passed(factors, tokens):
    try:
        up = upsampled(BASE, factors, SIZES, tokens)
    except InputError:
        assert sum(BASE[name] * factor for name, factor in factors.items()) > 1
        return
    assert sum(up.values()) == pytest.approx(1) and min(up.values()) >= 0
    assert all(passes(up, SIZES, tokens)[name] <= 4 + 1e-9 for name in factors)


def test_what_can_not_be_upsampled_is_refused():
    with pytest.raises(InputError, match="Did you mean 'maths'"):
        upsampled(BASE, {"math": 2}, SIZES, 1000)
    with pytest.raises(InputError, match=r"would take 1\.2 of the phase"):
        upsampled(BASE, {"docs": 12}, SIZES, 10_000)


def test_leaving_one_out_keeps_the_ratios_of_the_others():
    left = without(BASE, "web")
    assert left["web"] == 0 and sum(left.values()) == pytest.approx(1)
    assert left["docs"] / left["maths"] == pytest.approx(2) and left["maths"] == pytest.approx(left["code"])
    with pytest.raises(InputError, match="is empty"):
        without({"a": 1, "b": 0}, "a")


def test_shares_by_size():
    assert by_size({"a": 100, "b": 400}) == pytest.approx({"a": 1 / 3, "b": 2 / 3})
    assert by_size({"a": 100, "b": 400}, 0) == {"a": 0.5, "b": 0.5}


@pytest.fixture(scope="module")
def three_sources(small_recipe, corpus_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    texts = [json.loads(line)["text"] for line in corpus_file.read_text().splitlines()]
    forms = {"plain": str, "upper": str.upper, "digits": lambda text: "".join(str(ord(c) % 10) for c in text)}
    sources = {}
    for name, form in forms.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": form(text)}) + "\n" for text in texts))
        sources[name] = {"corpus": str(folder / f"{name}.jsonl")}
    return train(
        small_recipe | {"data": small_recipe["data"] | {"sources": sources}}, folder / "run", ["training.tokens=40 steps", "checkpoint.every=20 steps"]
    )


def test_every_source_is_missed_most_by_itself(three_sources, tmp_path):
    weights, said = dict.fromkeys(("plain", "upper", "digits"), 1.0), []
    found = ablate_sources(three_sources.checkpoints()[0], weights, tmp_path / "phases", orders=2, sequences=24, say=said.append)
    assert said == [f"last phase, {name}" for name in ("all", "all-1", "without-plain", "without-upper", "without-digits")]
    assert all(max(row, key=row.get) == name and row[name] > 0 for name, row in found.effects.items())
    assert found.cost == pytest.approx(5 / 2) and all(math.isfinite(noise) for noise in found.noise.values())
    assert found.effects["plain"]["upper"] == found.losses["without plain"]["upper"] - found.losses["all"]["upper"]
    again = ablate_sources(three_sources.checkpoints()[0], weights, tmp_path / "phases", orders=2, sequences=24, say=said.append)
    assert again == found and len(said) == 5, "runs are found again"


def test_a_phase_keeps_rates_and_says_what_it_changed(three_sources, tmp_path):
    ablate_sources(three_sources.checkpoints()[0], {"plain": 0.5, "upper": 0.5, "digits": 0}, tmp_path / "p", drop=["plain"], orders=1, sequences=6)
    from cairn.training.run import Run

    run = Run(tmp_path / "p" / "without-plain")
    assert [row["learning_rate"] for row in run.metrics()] == [row["learning_rate"] for row in three_sources.metrics()[20:]]
    newest = run.newest()
    assert newest.lineage.parents[0].digest and newest.lineage.parents[0].step == 20
    assert newest.trainer["feed"]["mixture"][-1] == [160, {"digits": 0.0, "plain": 0.0, "upper": 1.0}]


@pytest.mark.parametrize(
    ("checkpoint", "weights", "sentence"),
    [(-1, {"plain": 1, "upper": 1, "digits": 1}, "The run ends at 10240 tokens"), (0, {"plain": 1, "upper": 1}, "'digits' does not fit")],
)
def test_impossible_valuations_are_refused(three_sources, tmp_path, checkpoint, weights, sentence):
    with pytest.raises(InputError, match=sentence):
        ablate_sources(three_sources.checkpoints()[checkpoint], weights, tmp_path / "p")
    assert not (tmp_path / "p").exists()
