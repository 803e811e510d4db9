"""What a process holds is divided by what divides it."""

import pytest
import torch

from cairn.training import recipe as recipes
from cairn.training.estimate import estimate, per_process


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
