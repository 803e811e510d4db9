"""What every ingredient of training promises: a kill and a resume change no bit, its config round-trips, a typo is named."""

import pytest

from cairn import catalog
from cairn.errors import InputError
from cairn.options import configure, method_options
from cairn.train.run import resume, train

KINDS = ("objective", "optimizer", "schedule", "event")
MEMBERS = [(kind, name) for kind in KINDS for name in catalog.names(kind)]
OPTIONS: dict[tuple[str, str], dict] = {
    ("objective", "compatible"): {"old": "RUN/checkpoints/step-00000005", "new": "RUN/checkpoints/step-00000020", "marker": [220], "end": [13]},
    ("event", "evaluate"): {"every": "6 steps", "measurements": [{"name": "held-out", "sequences": 4}]},
    ("event", "sample"): {"every": "6 steps", "new_tokens": 4},
    ("event", "repeats"): {"every": "6 steps", "limit": 0.05},
}


def ingredient(kind, name):
    return {"name": name, **OPTIONS.get((kind, name), {})}


def overrides(kind, name, run):
    import json

    value = json.dumps(ingredient(kind, name)).replace("RUN", str(run.path))  # options may name checkpoints of `small_run`
    return [f"events=[{value}]" if kind == "event" else f"{kind}={value}", "training.tokens=12 steps"]


def test_at_least_two_of_the_catalog_are_ingredients_with_state():
    assert len(MEMBERS) >= 8


@pytest.mark.parametrize(("kind", "name"), MEMBERS)
@pytest.mark.parametrize("stop", [1, 7])
def test_a_stop_and_a_resume_change_no_bit(kind, name, stop, small_recipe, small_run, tmp_path):
    whole = train(small_recipe, tmp_path / "whole", overrides(kind, name, small_run))
    train(small_recipe, tmp_path / "cut", overrides(kind, name, small_run), stop_at_step=stop)
    again = resume(tmp_path / "cut")
    clock = {"tokens_per_second", "seconds"}
    rows = [[{k: v for k, v in row.items() if k not in clock} for row in run.metrics()] for run in (whole, again)]
    assert rows[0] == rows[1]
    assert again.newest().digest == whole.newest().digest and again.samples() == whole.samples()


@pytest.mark.parametrize(("kind", "name"), MEMBERS)
def test_its_options_round_trip(kind, name):
    method = configure(kind, ingredient(kind, name))
    assert configure(kind, method_options(method)) == method


@pytest.mark.parametrize(("kind", "name"), MEMBERS)
def test_a_typo_names_the_nearest_key(kind, name):
    fields = catalog.get(kind, name).implementation.model_fields
    key = max(fields, key=len)
    with pytest.raises(InputError, match=f"Did you mean '{key}'"):
        configure(kind, {"name": name, key[:-1] + "x": 1})
