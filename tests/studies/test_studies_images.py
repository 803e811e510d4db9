"""Autoencoders that learn from each other's images: the pools, what is drawn, and the arms of the study."""

import math

import numpy as np
import pytest
import torch

from cairn.studies.continual import collapse, images
from cairn.training import recipe as recipes


def test_pools_hold_as_many_of_each_as_the_policy_says(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "IMAGES", 30)
    sets = [images.stored(tmp_path / f"{number}.npz", np.full((30, 2, 2), number, np.uint8)) for number in range(3)]
    for policy, expected in (("replace", [0, 0, 30]), ("accumulate", [30, 30, 30]), ("subsample", [10, 10, 10])):
        recipe = recipes.load(images.recipe(1, images.pooled(policy, sets), 1, {"name": "vae"}, "elbo"))
        _, feed = recipe.data.open(recipe.seed)
        read = feed.samples(np.arange(sum(expected)))
        found = np.round(read.inputs["pixel_values"][:, 0, 0, 0] * 255).astype(int)
        assert [int((found == number).sum()) for number in range(3)] == expected, "one pass reads so many of each"


def test_classes_are_counted_and_a_classifier_is_asked(real_data):
    real = images.digits(3)
    assert set(np.unique(real.learned)) == {0, 255} and len(real.tested) == images.TESTED
    assert not {image.tobytes() for image in real.learned[:500]} & {image.tobytes() for image in real.tested}
    logits = torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 1]), 10).double()
    assert images.class_entropy(logits) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), abs=1e-12)
    assert math.isnan(images.class_entropy(logits / 0))


def test_all_policies_begin_with_the_same_generation_and_swapped_names_fail(real_data, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "GENERATIONS", 2)
    for name, less in {"IMAGES": 200, "TESTED": 200, "DRAWS": 1}.items():
        monkeypatch.setattr(images, name, less)
    found = images.image_arms(99, tmp_path, lambda text: None, steps=4)
    assert len({found[policy]["elbo"][0] for policy in images.POLICIES}) == 1
    assert found["replace"]["elbo"][1] != found["accumulate"]["elbo"][1]
    made = {"replace": {"elbo": [-100.0, -130.0]}, "accumulate": {"elbo": [-100.0, -105.0]}}
    apart = collapse._fall(made["replace"]) - collapse._fall(made["accumulate"])
    assert apart == 25
