"""No schedule is ever negative, infinite or above the full rate, whatever its options are; and no option of a method loses the bounds of its base."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from cairn import catalog
from cairn.errors import InputError
from cairn.options import Amount, Options, configure

BATCH, TOTAL = 256, 256 * 40
amounts = st.one_of(st.integers(0, 60).map(lambda n: Amount(n, "steps")), st.floats(0, 150).map(lambda p: Amount(p, "%")))
shares = st.floats(0, 1)


@pytest.mark.parametrize("name", catalog.names("schedule"))
@settings(max_examples=150)
@given(data=st.data())
def test_a_factor_is_a_share_at_every_moment(name, data):
    options = {"name": name}
    fields = catalog.get("schedule", name).implementation.model_fields
    for key, field in fields.items():
        if field.annotation is Amount:
            options[key] = data.draw(amounts, key)
        elif field.annotation is float and key != "steepness":
            options[key] = data.draw(shares, key)
        elif getattr(field.annotation, "__args__", None) and all(isinstance(choice, str) for choice in field.annotation.__args__):
            options[key] = data.draw(st.sampled_from(field.annotation.__args__), key)
    try:
        schedule = configure("schedule", options).pinned(BATCH, TOTAL)
    except InputError:
        return  # refused, in one sentence
    for step in (0, 1, 2, 19, 20, 39, 40, 41, 1000):
        factor = schedule.factor(step * BATCH, BATCH)
        assert math.isfinite(factor) and 0 <= factor <= 1 + 1e-12, (step, factor)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "rewarm"])
@pytest.mark.parametrize("final", [-0.5, 1.5, math.nan, math.inf])
def test_the_rate_that_is_left_is_a_share_in_every_schedule(name, final):
    with pytest.raises(InputError, match="final"):
        configure("schedule", {"name": name, "final": final})


def bounds(field: FieldInfo) -> set[str]:
    """The bounds of a field, in words."""
    return {repr(part) for part in field.metadata if type(part).__name__ in ("Ge", "Gt", "Le", "Lt", "AfterValidator")}


def at_least(field: FieldInfo) -> float | None:
    """The smallest value that a field takes, where it says one."""
    return max((part.ge for part in field.metadata if type(part).__name__ == "Ge"), default=None)


def looser(field: FieldInfo, base: FieldInfo) -> set[str]:
    """Bounds of the field of a base that a field has neither as they are nor more tightly."""
    lost, least = bounds(base) - bounds(field), at_least(base)
    if least is not None and (at_least(field) or least - 1) >= least:
        lost.discard(f"Ge(ge={least})")
    return lost


def test_no_method_drops_a_bound_of_its_base():
    """A field that is written again with another default must be bounded as before."""
    for kind in catalog.KINDS:
        for name in catalog.names(kind):
            method = catalog.get(kind, name).implementation
            if not (isinstance(method, type) and issubclass(method, Options)):
                continue
            for base in method.__mro__[1:]:
                for key, field in getattr(base, "model_fields", {}).items():
                    assert not (lost := looser(method.model_fields[key], field)), f"{kind} '{name}': {key} is bounded in {base.__name__} by {lost}"


def test_lengths_in_percent_are_shares_of_what_is_left_from_the_start_on():
    schedule = configure("schedule", {"name": "linear", "start": Amount(30, "steps"), "warmup": "10%"}).pinned(BATCH, TOTAL)
    assert (schedule.horizon, schedule.warmup, schedule.start) == tuple(Amount(n * BATCH, "") for n in (10, 1, 30))
    assert schedule.factor(39 * BATCH, BATCH) > 0 and schedule.factor(40 * BATCH, BATCH) == 0
