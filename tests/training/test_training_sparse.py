"""Sparse pretraining: exact counts, zeros that stay zero in weights and moments, masks that travel, and dense fine-tuning."""

import itertools
import math

import numpy as np
import pytest
import torch

from cairn.checkpoint.format import read
from cairn.checkpoint.format.parts import Part
from cairn.errors import CairnError, NotFoundError, ResumeError
from cairn.randomness import seed_for
from cairn.training import recipe as recipes
from cairn.training import sparsity
from cairn.training.estimate import estimate
from cairn.training.run import fork, resume, train
from tests.training.test_training_run import trainer

ON = ["callbacks=[{name: sparse, sparsity: 0.75}]"]


@pytest.mark.parametrize(("shape", "share"), itertools.product([(1, 1), (3, 5), (16, 16), (7, 64), (33, 12)], [0.0, 0.5, 0.75, 0.9]))
def test_a_mask_keeps_exactly_what_the_formula_says_however_it_is_cut(shape, share):
    count = sparsity.kept({"w": shape}, share)["w"]
    whole = sparsity.random_mask("w", shape, count, 3, Part("w", (0, 0), shape))
    assert count == round((1 - share) * math.prod(shape)) == whole.sum()
    below = shape[0] // 2
    cut = [
        sparsity.random_mask("w", shape, count, 3, part) for part in (Part("w", (0, 0), (below, shape[1])), Part("w", (below, 0), (shape[0] - below, shape[1])))
    ]
    assert np.array_equal(np.concatenate(cut), whole)


def test_the_larger_the_sparser_by_erk_and_the_whole_as_asked():
    shapes = {"small": (8, 8), "middle": (64, 32), "large": (128, 128)}
    counts = sparsity.kept(shapes, 0.8, "erk")
    shares = [counts[name] / math.prod(shape) for name, shape in shapes.items()]
    total = sum(map(math.prod, shapes.values()))
    assert shares[0] == 1 and shares[0] > shares[1] > shares[2] and sum(counts.values()) == pytest.approx(0.2 * total, abs=2)
    assert shares[1] / shares[2] == pytest.approx((96 / 2048) / (256 / 16384), rel=0.01)


def test_masks_move_from_the_smallest_weights_to_the_largest_gradients_and_keep_their_number():
    weight = torch.tensor([[5.0, -0.1, 3.0, 0.2], [0, 0, 0, 0]])
    gradient = torch.tensor([[0, 9.0, 0, 0.1], [0.3, -4.0, 0.2, 2.0]])
    mask = weight != 0
    moved = sparsity.moved_mask(weight, mask, gradient, 0.5)
    assert moved.tolist() == [[True, True, True, False], [False, True, False, False]]  # 9 comes back at once, -4 is new, 0.2 goes
    assert torch.equal(sparsity.moved_mask(weight, mask, gradient, 0.0), mask)


@pytest.mark.parametrize("update", ["static", "rigl"])
def test_what_is_masked_is_exactly_zero_in_weights_and_moments(update, small_recipe, tmp_path):
    options = f"callbacks=[{{name: sparse, sparsity: 0.75, update: {update}, every: 3 steps}}]"
    run = train(
        small_recipe,
        tmp_path / "run",
        [options, "optimizer.weight_decay=0.3", "training.tokens=50 steps", "checkpoint.every=50 steps", "checkpoint.first=true"],
    )
    first, last = masks_of(read.open(run.checkpoints()[0])), torch_state(run.checkpoints()[-1])
    for name, mask in last["masks"].items():
        shape = tuple(mask.shape)
        assert int(mask.sum()) == round(0.25 * math.prod(shape)) == int(first[name].sum())
        assert not last["weights"][name][~mask].any() and not last["moments"][name][~mask].any() and not last["squares"][name][~mask].any()
        assert bool(last["weights"][name][mask].any()) and torch.equal(mask, first[name]) == (update == "static")
    untouched = set(last["weights"]) - set(last["masks"])
    assert {name for name in untouched if "layers" in name and "norm" not in name} == set()
    assert bool((last["weights"]["model.embed_tokens.weight"] != 0).all())
    if update == "rigl":
        assert run.newest().trainer["callbacks"]["sparse"]["moves"] == 12  # every third step until three quarters
        assert all((last["masks"][name] & ~first[name]).any() for name in last["masks"])


def masks_of(checkpoint):
    return {name.removeprefix("sparse/"): tensor.load() for name, tensor in checkpoint.ingredients.items()}


def torch_state(path):
    checkpoint = read.open(path)
    weights, moments = checkpoint.tensors.load(), checkpoint.optimizer.load()
    by = {key: {name: moments[f"{name}/{key}"] for name in weights} for key in ("exp_avg", "exp_avg_sq")}
    return {"weights": weights, "masks": masks_of(checkpoint), "moments": by["exp_avg"], "squares": by["exp_avg_sq"]}


def test_without_zeros_it_is_the_dense_trainer_bit_for_bit(small_recipe, small_run, tmp_path):
    run = train(small_recipe, tmp_path / "run", ["callbacks=[{name: sparse, sparsity: 0}]"])
    assert all(torch.equal(t.load(), run.newest().tensors[name].load()) for name, t in small_run.newest().tensors.items())


def test_clipping_sees_only_the_live_gradients(small_recipe):
    sparse = trainer(small_recipe, *ON)
    micro_batches = sparse.micro_batches(0)
    sparse.gradients(micro_batches)
    dense = {name: p.grad.clone() for name, p in sparse.model.named_parameters()}
    sparse.optimizer.zero_grad()
    masks = sparse.handlers[0].masks
    live = [gradient * masks[name] if name in masks else gradient for name, gradient in dense.items()]
    norm = float(torch.cat([g.flatten() for g in live]).norm())
    assert sparse.update(micro_batches)["grad_norm"] == pytest.approx(norm, rel=1e-5) != float(torch.cat([g.flatten() for g in dense.values()]).norm())


def test_a_fork_without_the_event_changes_no_value_and_trains_every_entry(small_recipe, tmp_path):
    from cairn.checkpoint.foreign.export import export

    run = train(small_recipe, tmp_path / "sparse", ON)
    sparse = run.newest()
    dense = fork(sparse, tmp_path / "dense", ["callbacks=[]", "training.tokens=21 steps", "schedule=constant"], fresh=["optimizer"]).newest()
    assert dense.ingredients is None and any("callbacks" in line for line in dense.lineage.changed)
    name = "model.layers.1.mlp.down_proj.weight"
    assert float((sparse.tensors[name].load() != 0).float().mean()) == 0.25 and float((dense.tensors[name].load() != 0).float().mean()) > 0.95
    kept = fork(sparse, tmp_path / "kept", ["training.tokens=21 steps", "schedule=constant"], fresh=["optimizer"]).newest()
    assert torch.equal(kept.ingredients[f"sparse/{name}"].load(), sparse.ingredients[f"sparse/{name}"].load())
    assert float((kept.tensors[name].load() != 0).float().mean()) == 0.25
    out = export(sparse, tmp_path / "out")
    assert torch.equal(out.tensors[name].load(), sparse.tensors[name].load())


def test_a_beginning_without_masks_is_refused(small_recipe, small_run, tmp_path):
    from cairn.checkpoint.foreign.export import export

    for number, source in enumerate((small_run.newest(), export(small_run.newest(), tmp_path / "bare"))):
        with pytest.raises(ResumeError, match="was not trained with these masks"):
            fork(
                source,
                tmp_path / f"fork-{number}",
                ON,
                recipe={**small_recipe, "training": {**small_recipe["training"], "tokens": "25 steps"}},
                fresh=["optimizer"],
            )


def test_operations_with_and_without_the_zeros(small_recipe, small_run, tmp_path):
    run = train(small_recipe, tmp_path / "run", [*ON, "training.tokens=2 steps"])
    found = sparsity.sparsity(run.path)
    per_layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64
    assert found["masked_parameters"] == 2 * per_layer and found["kept_parameters"] == per_layer // 2
    assert found["sparsity_of_masked"] == 0.75 and found["sparsity_of_model"] < 0.5
    assert found["dense_flops_per_token"] - found["sparse_flops_per_token"] == pytest.approx(6 * 0.75 * 2 * per_layer)
    assert found["sparse_flops"] == 2 * 256 * found["sparse_flops_per_token"]
    with pytest.raises(NotFoundError, match="holds no masks"):
        sparsity.sparsity(small_run.path)


def test_the_published_model_saves_what_the_formula_says():
    """GPT-3 XL's sizes in our family: 24 layers of width 2048, context 2048, vocabulary 50257; head and scores stay dense."""
    model = {"name": "llama", "hidden_size": 2048, "intermediate_size": 5464, "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 50257}
    recipe = {"model": model, "data": {"sources": {"a": {"corpus": "python-docs"}}, "sequence_length": 2048}, "training": {"batch": 2048}}
    found = estimate(recipes.load({**recipe, "callbacks": [{"name": "sparse", "sparsity": 0.75}]}))
    masked = 24 * (4 * 2048**2 + 3 * 2048 * 5464)
    scores = 12 * 24 * 2048 * 2048  # per token, forward and backward, all pairs
    dense = 6 * (masked + 50257 * 2048) + scores
    assert found["flops_per_token"] == dense and found["sparse_flops_per_token"] == pytest.approx(dense - 6 * 0.75 * masked)
    assert 2.3 < found["sparse_reduction"] < 2.6  # published: 2.5 times fewer
    assert "sparse_reduction" not in estimate(recipes.load(recipe))


def test_masks_that_move_resume_exactly_and_need_whole_matrices(small_recipe, tmp_path):
    options = ["callbacks=[{name: sparse, update: rigl, every: 2 steps, until: 90%}]"]
    whole = train(small_recipe, tmp_path / "whole", options)
    train(small_recipe, tmp_path / "cut", options, stop_at_step=7)
    assert resume(tmp_path / "cut").newest().digest == whole.newest().digest


WORKER = """
import json, os, sys
import torch.distributed as dist
from cairn.errors import InputError
from cairn.training.run import train
dist.init_process_group("gloo")
recipe, folder = json.loads(sys.argv[1])
for name, layout in {"data": "parallel.data=2", "shard": "parallel.shard=2"}.items():
    train(recipe, f"{folder}/{name}", [layout, "training.precision=float64", "training.tokens=4 steps"])
try:
    train({**recipe, "callbacks": [{"name": "sparse", "update": "rigl"}]}, f"{folder}/no", ["parallel.shard=2"])
except InputError as error:
    open(f"{folder}/said-{dist.get_rank()}", "w").write(str(error))
os._exit(0)
"""


def test_every_layout_has_the_same_masks(small_recipe, tmp_path):
    import json

    from cairn.training.run import Run
    from tests.faults import torchrun

    recipe = {**small_recipe, "callbacks": [{"name": "sparse", "sparsity": 0.6}]}
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun(2, tmp_path / "worker.py", json.dumps([recipe, str(tmp_path)]))
    alone = train(recipe, tmp_path / "alone", ["training.precision=float64", "training.tokens=4 steps"])
    for name in ("data", "shard"):
        run = Run(tmp_path / name)
        assert [r["loss"] for r in run.metrics()] == pytest.approx([r["loss"] for r in alone.metrics()], rel=1e-9)
        assert all(torch.equal(t.load(), run.newest().ingredients[key].load()) for key, t in alone.newest().ingredients.items())
    assert "need whole matrices" in (tmp_path / "said-0").read_text()


def test_a_nonsense_sparsity_is_refused(small_recipe):
    with pytest.raises(CairnError, match="less than 1"):
        trainer(small_recipe, "callbacks=[{name: sparse, sparsity: 1.0}]")
    assert seed_for(1, "sparse", "a") != seed_for(1, "sparse", "b")
