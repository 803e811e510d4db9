"""Strict options, quantities as people write them, overrides, methods by name."""

from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn import catalog, options
from cairn.errors import InputError
from cairn.options import Amount, Bytes, Count, Method, Options


class Inner(Options):
    learning_rate: float = 0.1
    fused: bool = True


class Outer(Options):
    inner: Inner = Inner()
    many: dict[str, Inner] = {}
    size: Bytes = 0
    count: Count = 1
    length: Amount = Amount(1, "tokens")
    schedule: Annotated[Any, Method("schedule")] = "constant"


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("20B tokens", 20e9, "tokens"),
        ("1.5M", 1.5e6, ""),
        ("60k samples", 60e3, "samples"),
        ("1 sample", 1, "samples"),
        ("500 steps", 500, "steps"),
        ("1 step", 1, "steps"),
        ("10%", 10, "%"),
        (4096, 4096, ""),
        ("524_288 tokens", 524288, "tokens"),
    ],
)
def test_amounts_are_read_as_people_write_them(text, value, unit):
    assert Amount.parse(text) == Amount(value, unit)


@pytest.mark.parametrize("text", ["", "many", "-5 steps", "3 weeks", None, True])
def test_what_is_no_amount_is_refused_in_one_sentence(text):
    with pytest.raises(InputError, match=r"length: '.*' is not an amount"):
        Outer.parse({"length": text})


@given(st.integers(0, 10**13), st.sampled_from(["tokens", "samples", "steps", "%", ""]))
def test_an_amount_survives_its_own_text(value, unit):
    amount = Amount(float(value), unit)
    assert Amount.parse(str(amount)) == amount


def test_steps_and_percents_become_whole_steps_of_tokens():
    assert Amount.parse("10%").units(1000, 12345) == 1000
    assert Amount.parse("3 steps").units(1000) == 3000
    assert Amount.parse("2500 tokens").steps(1000) == 3
    with pytest.raises(InputError, match="known length"):
        Amount.parse("10%").units(1000)


@pytest.mark.parametrize(("text", "value"), [("2 GiB", 2 * 2**30), ("500MB", 500 * 10**6), ("1k", 1000), (7, 7), ("1 TB", 10**12)])
def test_sizes(text, value):
    assert Outer.parse({"size": text}).size == value


@pytest.mark.parametrize(("values", "sentence"), [
    ({"iner": {}}, "unknown key 'iner'. Did you mean 'inner'?"),
    ({"inner": {"learning_rat": 1}}, "unknown key 'inner.learning_rat'. Did you mean 'learning_rate'?"),
    ({"many": {"a": {"fusd": 1}}}, "unknown key 'many.a.fusd'. Did you mean 'fused'?"),
    ({"schedule": "cosin"}, "There is no schedule 'cosin'. Did you mean 'cosine'?"),
    ({"schedule": {"name": "wsd", "decay_shap": "sqrt"}}, "schedule 'wsd': unknown key 'decay_shap'. Did you mean 'decay_shape'?"),
])  # fmt: skip
def test_an_unknown_key_names_the_nearest(values, sentence):
    with pytest.raises(InputError) as caught:
        Outer.parse(values)
    assert sentence in str(caught.value)


def test_the_text_false_is_false():
    assert Inner.parse({"fused": "False"}).fused is False
    assert options.override({"inner": {}}, ["inner.fused=False"])["inner"]["fused"] is False


def test_overrides_reach_into_methods_written_as_a_bare_name_and_into_lists():
    values = options.override({"schedule": "cosine", "callbacks": [{"name": "ema"}]}, ["schedule.final=0.2", "callbacks.0.decay=0.9", "new.key=1e-3"])
    assert values == {"schedule": {"name": "cosine", "final": 0.2}, "callbacks": [{"name": "ema", "decay": 0.9}], "new": {"key": "1e-3"}}
    assert Inner.parse({"learning_rate": "3e-4"}).learning_rate == 3e-4


@pytest.mark.parametrize("text", ["novalue", "=3", "callbacks.7.decay=1", "seed.deep=1"])
def test_impossible_overrides_are_refused(text):
    with pytest.raises(InputError):
        options.override({"callbacks": [], "seed": 3}, [text])


def test_a_method_round_trips_through_plain_values():
    outer = Outer.parse({"schedule": {"name": "wsd", "decay": "20%", "warmup": "5 steps"}})
    plain = outer.model_dump(mode="json")
    assert plain["schedule"]["name"] == "wsd" and plain["schedule"]["decay"] == "20%"
    assert Outer.parse(plain) == outer


def test_a_key_that_is_written_with_dots_is_found_by_its_path():
    stages = {"stages": [{"set": {"training.tokens": "8 steps", "seed": 1}}]}
    changed = options.override(stages, ["stages.0.set.training.tokens=4 steps", "stages.0.set.seed=2"])
    assert changed == {"stages": [{"set": {"training.tokens": "4 steps", "seed": 2}}]} and stages["stages"][0]["set"]["seed"] == 1


class Numbers(Options):
    one: float = 1.0
    maybe: float | None = None
    either: list[float] | dict[str, float] = []
    deep: dict[str, list[float]] = {}
    length: Amount = Amount(1, "tokens")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), "nan", "inf"])
@pytest.mark.parametrize("place", ["one", "maybe", "either", "either.x", "deep.x", "length"])
def test_every_number_is_finite_wherever_it_stands(place, number):
    key, _, inside = place.partition(".")
    value = {inside: [number] if key == "deep" else number} if inside else [number] if key == "either" else number
    with pytest.raises(InputError, match=r"finite number|is not an amount"):
        Numbers.parse({key: value})


def test_every_registered_method_refuses_numbers_that_are_not_finite():
    """Of each option that takes a number: no class of options may allow what the base does not."""
    seen = 0
    for entry in (entry for kind in ("operation", "growth", "schedule", "optimizer", "reweighting") for entry in catalog.entries(kind)):
        if isinstance(entry.implementation, type) and issubclass(entry.implementation, Options):
            assert entry.implementation.model_config["allow_inf_nan"] is False, entry.name
            for key, field in entry.implementation.model_fields.items():
                if field.annotation is float:
                    seen += 1
                    with pytest.raises(InputError, match=f"{key}: nan is not a finite number"):
                        entry.implementation.parse({key: float("nan")})
    assert seen > 20
