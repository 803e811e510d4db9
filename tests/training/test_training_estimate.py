"""What a process holds is divided by what divides it."""

import json

import pytest
import torch

from cairn.training import recipe as recipes
from cairn.training.estimate import estimate, memory_of, per_process, trained_numbers
from cairn.training.run import fork, train


def memory(*words: str) -> dict[str, float]:
    return estimate(recipes.load("dmas-1.7b", words))["memory_gb"]


def test_shards_divide_weights_gradients_and_moments():
    whole, cut = memory(), memory("parallel.shard=8")
    for name in ("weights", "gradients", "optimizer"):
        assert cut[name] == pytest.approx(whole[name] / 8, abs=0.02)
    assert cut["activations"] <= whole["activations"]


def test_copies_divide_the_batch_alone():
    whole, copies = memory("training.micro_batch=null"), memory("training.micro_batch=null", "parallel.data=8")
    assert [copies[name] for name in ("weights", "gradients", "optimizer")] == [whole[name] for name in ("weights", "gradients", "optimizer")]
    assert copies["activations"] == pytest.approx(whole["activations"] / 8, abs=0.02)


def test_tensor_parallelism_divides_the_matrices_of_the_blocks(small_recipe):
    """Counted on the model itself: what is no matrix inside a block stays whole."""
    recipe = recipes.load(small_recipe, ["parallel.tensor=2", "model.vocab_size=257"])
    shapes = dict(recipe.model.meta_model().named_parameters())
    inside = sum(p.numel() for name, p in shapes.items() if ".layers." in name and p.dim() == 2)
    rest = sum(p.numel() for p in shapes.values()) - inside
    found = per_process(recipe, {"weights": 4 * (inside + rest), "activations": 10**9}, 32)
    assert found["weights"] == 4 * (inside // 2 + rest) and found["activations"] < 10**9
    assert torch.Size((257, 32)) in {p.shape for p in shapes.values()}


def measured(run):
    """Bytes of the gradients of one step of a run, of its moments and of its weights, from what the run itself makes."""
    from cairn.training.loggers import Logger
    from cairn.training.loop import Trainer
    from cairn.training.parallel import joined
    from cairn.training.sources import open_data

    recipe, newest = run.recipe, run.newest()
    with joined(recipe) as world:
        preprocessor, feed = open_data(recipe.data, recipe.seed, recipe.data.preprocessor_of(newest), objective=recipe.objective)
        trainer = Trainer(recipe, preprocessor, feed, world, Logger())
        trainer.gradients(trainer.micro_batches(0))
        parameters = list(trainer.model.parameters())
    gradients = sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
    moments = sum(tensor.nbytes for name, tensor in newest.optimizer.items() if not name.endswith("/step"))
    return {"weights": sum(parameter.nbytes for parameter in parameters), "gradients": gradients, "optimizer": moments}


def test_what_trains_in_part_has_gradients_and_moments_of_that_part_alone(small_recipe, adapter_run, small_run, tmp_path):
    part = train(small_recipe, tmp_path / "part", ["trainable=[norm, model.layers.1.*]", "training.tokens=2 steps"])
    for run in (part, adapter_run, small_run):
        told = memory_of(run.recipe)
        assert {name: told[name] for name in ("weights", "gradients", "optimizer")} == measured(run), run.path
    assert memory_of(part.recipe)["gradients"] < memory_of(small_run.recipe)["gradients"] / 1.5
    assert trained_numbers(small_run.recipe) == (small_run.recipe.model.parameter_count(), 0)
    trained, added = trained_numbers(adapter_run.recipe)
    assert trained == added == adapter_run.newest().stored.nbytes // 4


def test_a_run_in_part_is_told_and_its_checkpoint_is_smaller(small_recipe):
    whole, part = (estimate(recipes.load("dmas-1.7b", more)) for more in ([], ["trainable=[model.layers.0.*]"]))
    assert "trained_parameters" not in whole and 0 < part["trained_parameters"] < whole["parameters"] / 10
    assert part["memory_gb"]["optimizer"] < whole["memory_gb"]["optimizer"] / 10 and part["memory_gb"]["weights"] == whole["memory_gb"]["weights"]
    assert part["checkpoint_gb"] < whole["checkpoint_gb"] / 2


def test_teachers_take_memory(small_recipe, small_run, tmp_path):
    more = ["objective={name: compatible, marker: [220], end: [13]}", f"teacher={json.dumps({'old': str(small_run.newest().path), 'new': {'ema': 0.5}})}"]
    recipe = fork(small_run.newest(), tmp_path / "r", [*more, "training.tokens=21 steps"], fresh=["optimizer"]).recipe
    assert memory_of(recipe)["teachers"] == 2 * memory_of(recipe)["weights"]
