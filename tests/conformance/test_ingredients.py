"""What every ingredient of training promises: a kill and a resume change no bit, its config round-trips, a typo is named."""

import json

import pytest

from cairn import catalog
from cairn.errors import InputError
from cairn.options import configure, method_options
from cairn.training.run import fork, resume, train

TEACHERS = {"compatible": "{old: RUN/checkpoints/step-00000005, new: {ema: 0.5}}", "distillation": "{teacher: {checkpoint: RUN/checkpoints/step-00000020}}"}
"""Teachers of objectives that have some: a frozen one and one that follows the student."""
KINDS = ("field", "adapter", "objective", "optimizer", "schedule", "reweighting", "filter", "callback")
MEMBERS = [(kind, name) for kind in KINDS for name in catalog.names(kind)]
OPTIONS: dict[tuple[str, str], dict] = {
    ("objective", "compatible"): {"marker": [220], "end": [13]},
    ("field", "text"): {"sources": {"all": {"corpus": "CORPUS"}}, "sequence_length": 16, "held_out": 0.1},
    ("field", "images"): {"sources": {"all": {"images": "IMAGES"}}, "augmentation": {"shift": 2}},
    ("adapter", "lora"): {"rank": 2, "dropout": 0.1},
    ("filter", "repeats"): {"longest": 7, "times": 2},
    ("callback", "evaluate"): {"every": "6 steps", "measurements": [{"name": "held-out", "sequences": 4}]},
    ("callback", "sample"): {"every": "6 steps", "new_tokens": 4},
    ("callback", "repeats"): {"every": "6 steps", "limit": 0.05},
}


def ingredient(kind, name):
    return {"name": name, **OPTIONS.get((kind, name), {})}


def overrides(kind, name, run, recipe):
    """The ingredient in the recipe; its options may name checkpoints of `small_run` and the data of the recipe."""
    source = next(iter(recipe["data"]["sources"].values()))
    value = json.dumps(ingredient(kind, name))
    for word, meant in {"RUN": str(run.path), "CORPUS": source.get("corpus", ""), "IMAGES": source.get("images", "")}.items():
        value = value.replace(word, meant)
    if kind == "objective" and name in TEACHERS:
        value = f"{value}\nteacher={TEACHERS[name]}".replace("RUN", str(run.path))
    written = {"callback": f"callbacks=[{value}]", "filter": f"data.filters=[{value}]", "field": f"data={value}"}
    return [*written.get(kind, f"{kind}={value}").split("\n"), f"training.{'samples' if 'name' in recipe['data'] else 'tokens'}=12 steps"]


@pytest.fixture
def recipe_of(kind, name, small_recipe, image_recipe):
    """A recipe of a field in which the ingredient can be used."""
    entry = catalog.get(kind, name).implementation
    words = {"field": "gives", "objective": "needs"}.get(kind)
    labelled = words is not None and "labels" in getattr(entry, words)
    return image_recipe if labelled else small_recipe


@pytest.fixture
def start(kind, name, recipe_of, small_run, tmp_path):
    """Begin a run that has the ingredient: from scratch, or from the checkpoint to which it belongs."""
    if (kind, name) == ("callback", "unmask"):
        from cairn.growth.enlarge import grow

        grown = grow("masked", small_run.checkpoints()[0], tmp_path / "grown", {"factor": 2, "width": 2})
        more = ["training.tokens=17 steps", "callbacks.0.length=10 steps"]
        return lambda run, stop=None: fork(grown, tmp_path / run, more, fresh=["optimizer"], stop_at_step=stop and stop + 5)
    if kind == "adapter":
        more = [*overrides(kind, name, small_run, recipe_of)[:-1], "training.tokens=17 steps"]
        return lambda run, stop=None: fork(small_run.checkpoints()[0], tmp_path / run, more, stop_at_step=stop and stop + 5)
    return lambda run, stop=None: train(recipe_of, tmp_path / run, overrides(kind, name, small_run, recipe_of), stop_at_step=stop)


def test_at_least_two_of_the_catalog_are_ingredients_with_state():
    assert len(MEMBERS) >= 8


@pytest.mark.parametrize(("kind", "name"), MEMBERS)
@pytest.mark.parametrize("stop", [1, 7])
def test_a_stop_and_a_resume_change_no_bit(kind, name, stop, start, tmp_path):
    whole = start("whole")
    start("cut", stop)
    again = resume(tmp_path / "cut")
    clock = {"tokens_per_second", "samples_per_second", "seconds"}
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
