"""Ingredients together: a grown trunk on an infinite schedule, sparse weights under a mixture that changes at the end."""

import pytest
import torch

from cairn.growth.enlarge import grow
from cairn.training.recipe import load
from cairn.training.run import fork, resume, train

INFINITE = "schedule={name: infinite, warmup: 2 steps, cooldown: 4 steps, constant: 0.5}"


def test_a_trunk_without_an_end_grows_and_is_annealed_on_a_branch(small_recipe, tmp_path):
    trunk = train(small_recipe, tmp_path / "trunk", [INFINITE, "training.tokens=10 steps"])
    large = grow("stack", trunk.path, tmp_path / "large", {"factor": 2})
    settings = ["schedule.start=now", "training.tokens=20 steps"]
    whole = fork(large, tmp_path / "whole", settings, fresh=["optimizer"])
    rates = [row["learning_rate"] for row in whole.metrics()]
    assert rates[:2] == [1.5e-3, 3e-3] and all(abs(rate - 1.5e-3) < 1e-9 for rate in rates[4:])  # warm-up, cooldown, constant: counted from the growth
    fork(large, tmp_path / "cut", settings, fresh=["optimizer"], stop_at_step=13)
    assert resume(tmp_path / "cut").newest().digest == whole.newest().digest
    before = whole.newest().digest
    branch = fork(whole.newest(), tmp_path / "branch", ["schedule.anneal=5 steps", "schedule.anneal_at=now", "training.tokens=25 steps"])
    assert branch.metrics()[-1]["learning_rate"] < 3e-4 and whole.newest().digest == before
    assert branch.newest().config["num_hidden_layers"] == 4 and branch.newest().trainer["position"] == 25 * 8


def test_masks_hold_while_the_mixture_changes_at_the_end(small_recipe, corpus_file, tmp_path):
    import json

    sources = {name: {"corpus": str(corpus_file), "weight": weight} for name, weight in (("common", 0.9), ("rare", 0.1))}
    settings = [
        f"data.sources={json.dumps(sources)}",
        "data.mixture=[{at: 60%, weights: {common: 0, rare: 1}}]",
        "callbacks=[{name: sparse, sparsity: 0.6, update: rigl, every: 4 steps}]",
    ]
    whole = train(small_recipe, tmp_path / "whole", settings)
    cursor = whole.newest().trainer["feed"]["cursor"]
    assert cursor["rare"] >= 64 and sum(cursor.values()) == 160  # eight steps of eight, and a tenth of what came before
    masks = {name.removeprefix("sparse/"): mask.load() for name, mask in whole.newest().ingredients.items()}
    assert masks and all(not whole.newest().tensors[name].load()[~mask].any() for name, mask in masks.items())
    for stop in (9, 12, 15):
        train(small_recipe, tmp_path / str(stop), settings, stop_at_step=stop)
        assert resume(tmp_path / str(stop)).newest().digest == whole.newest().digest
    dense = fork(whole.newest(), tmp_path / "dense", ["callbacks=[]", "training.tokens=21 steps"], fresh=["optimizer"]).newest()
    assert dense.trainer["feed"]["cursor"]["rare"] == cursor["rare"] + 8 and dense.ingredients is None
    assert all(torch.isfinite(tensor.load()).all() for tensor in dense.tensors.values())


@pytest.mark.parametrize(
    ("off", "on"),
    [
        ("data.mixture=[]", "data.mixture=[{at: 50%, weights: {walks: 1}}]"),
        ("data.sources.walks.subset=null", "data.sources.walks.subset=500"),
        ("callbacks=[]", "callbacks=[{name: sparse, sparsity: 0.75}]"),
        ("reweighting=null", "reweighting={name: loss-based}"),
        ("data.metadata=null", "data.metadata={field: source, transform: text, until: 90%}"),
        ("schedule.rewarm=0", "schedule.rewarm=4 steps"),
    ],
)
def test_an_ingredient_that_is_switched_off_leaves_the_recipe_as_it_was(small_recipe, off, on):
    """So what is switched off costs nothing: the same recipe is the same run."""
    assert load(small_recipe, [off]).plain() == load(small_recipe).plain() != load(small_recipe, [on]).plain()
