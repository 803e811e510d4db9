"""Mixtures of experts in training: the loss of their routers, the load of their experts, and every layout of processes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from cairn.data.text.tokenizer import byte_level
from cairn.errors import InputError, MismatchError
from cairn.models import experts
from cairn.models.families.llama import Llama
from cairn.models.families.mixtral import Mixtral
from cairn.models.families.olmoe import Olmoe
from cairn.models.families.qwen3_moe import Qwen3Moe
from cairn.models.kernels.experts import grouped_linear, stacked_linear
from cairn.training.objectives import Setting
from cairn.training.objectives.causal_lm import CausalLM
from cairn.training.run import Run, train
from tests.training.test_training_parallel import gap, layout, work

SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}


def test_the_balance_is_that_of_transformers() -> None:
    theirs = pytest.importorskip("transformers.models.mixtral.modeling_mixtral").load_balancing_loss_func
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(3, 20, 5, generator=generator) * 3 for _ in range(2)]
    routed = [experts.Routed(each, each.topk(2).indices) for each in logits]
    whole = experts.balance(experts.flattened(routed))
    torch.testing.assert_close(whole, theirs(tuple(each.flatten(0, 1) for each in logits), 5, 2)[None])
    rows = experts.balance(routed)
    torch.testing.assert_close(rows, torch.stack([theirs(tuple(each[row] for each in logits), 5, 2) for row in range(3)]))
    assert (rows - whole).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [Mixtral, Olmoe, Qwen3Moe])
def test_loss_and_gradients_with_the_routers_are_those_of_transformers(kind: type, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    a = kind(**SIZES, num_experts=4, router_aux_loss_coef=0.3)
    model = a.build(1).train()
    objective = CausalLM(router_balance="micro-batch").fitted(Setting(byte_level(), a, 15))
    assert objective.router_loss == 0.3 and not objective.separable
    ids = torch.randint(61, (3, 16), generator=torch.Generator().manual_seed(0))
    found = objective.loss(model, {"input_ids": ids[:, :-1], "targets": ids[:, 1:], "weights": torch.ones(3, 15)})
    (found.total / 45).backward()
    (tmp_path / "config.json").write_text(json.dumps(a.to_hf()))
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    reference = theirs(ids[:, :-1], labels=ids[:, :-1], shift_labels=ids[:, 1:].contiguous(), output_router_logits=True)
    reference.loss.backward()
    torch.testing.assert_close(found.total / 45, reference.loss)
    torch.testing.assert_close(found.parts["router_loss"] / 45, reference.aux_loss)
    for number, layer in enumerate(theirs.model.layers):
        block = model.model.layers[number].get_submodule(a.mlp_name)
        torch.testing.assert_close(block.gate.weight.grad, layer.mlp.gate.weight.grad, rtol=1e-4, atol=1e-6)
        down = torch.stack([expert.matrices[2].weight.grad for expert in block.experts])
        torch.testing.assert_close(down, layer.mlp.experts.down_proj.grad, rtol=1e-4, atol=1e-6)
    assert found.parts["expert_load"].shape == (2, 4) and (found.parts["expert_load"].sum(1) == 3 * 15 * a.num_experts_per_tok).all()
    assert all(block.routed is None for block in model.modules() if isinstance(block, experts.MixtureOfExperts))


def test_one_product_for_all_groups_is_that_of_each_group() -> None:
    """What a GPU takes, asked of the CPU: an empty group, one of one row, and gradients of all."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([3, 0, 1, 5])
    found = []
    for way in (grouped_linear, stacked_linear):
        generator.manual_seed(1)
        x = torch.randn(9, 16, generator=generator).requires_grad_()
        weights = [torch.randn(8, 16, generator=generator).requires_grad_() for _ in counts]
        out = way(x, counts, weights)
        (out * torch.arange(8.0)).sum().backward()
        found.append([out.detach(), x.grad, *(weight.grad for weight in weights)])
    torch.testing.assert_close(found[0], found[1])
    assert not found[0][3].any() and found[0][4].any()


def test_an_expert_that_nothing_is_sent_to_has_a_gradient_of_zero_however_it_is_called() -> None:
    a = Olmoe(**SIZES, num_experts=6, num_experts_per_tok=1)
    model, ids = a.build(0), torch.tensor([[3, 4]])
    found = []
    for watched in (False, True):
        model.zero_grad(set_to_none=True)
        handles = [e.matrices[0].register_forward_hook(lambda *_: None) for block in model.blocks() for e in block.mlp.experts if watched]
        out = model(ids, targets=ids)
        out.loss.backward()
        found.append((out.loss.detach(), [p.grad for p in model.parameters()]))
        for handle in handles:
            handle.remove()
    assert all(gradient is not None for _, gradients in found for gradient in gradients)
    torch.testing.assert_close(found[0], found[1])
    assert sum(float(e.matrices[0].weight.grad.abs().sum()) == 0 for e in model.model.layers[0].mlp.experts) >= 4


def test_the_routers_loss_is_refused_where_there_are_no_experts_and_what_a_mixture_can_not_do_is_said() -> None:
    llama = Llama(**SIZES)
    assert CausalLM().fitted(Setting(byte_level(), llama)).router_loss is None
    with pytest.raises(InputError, match="no experts"):
        CausalLM(router_loss=0.1).fitted(Setting(byte_level(), llama))
    with pytest.raises(InputError, match="more than there are experts"):
        Olmoe.parse({**SIZES, "num_experts": 2, "num_experts_per_tok": 3}, "model")
    with pytest.raises(MismatchError, match="clip_qkv"):
        Olmoe.from_hf({"model_type": "olmoe", "clip_qkv": 8.0})
    assert Qwen3Moe(**SIZES, num_experts=4, mlp_only_layers=[0, 1]).router_aux_loss is None


@pytest.fixture(scope="module")
def recipe(small_recipe):
    model = {"name": "olmoe", "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 4}
    training = {"tokens": "4 steps", "batch": 8 * 32, "micro_batch": 32, "precision": "float64", "compile": False}
    return {**small_recipe, "model": {**model, "router_aux_loss_coef": 0.1}, "training": training, "checkpoint": {"every": "100%"}, "callbacks": []}


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    return train(recipe, tmp_path_factory.mktemp("experts") / "alone")


def test_a_run_tells_the_load_of_its_experts_and_does_not_depend_on_micro_batches(recipe, alone, tmp_path) -> None:
    whole = train(recipe, tmp_path / "whole", ["training.micro_batch=256"])
    for key in ("loss", "router_loss", "expert_load_max", "expert_load_min", "grad_norm"):
        assert gap(whole, alone, key) < 1e-9, key
    row = alone.metrics()[-1]
    assert row["loss"] == pytest.approx(row["cross_entropy"] + 0.1 * row["router_loss"])
    assert row["expert_load_max"] > 1 > row["expert_load_min"] > 0
    cut = [train(recipe, tmp_path / str(size), [f"training.micro_batch={size}", "objective.router_balance=micro-batch"]) for size in (32, 256)]
    assert gap(*cut) > 1e-6


def test_mixtures_are_sharded_and_cut_over_processes(recipe, alone, tmp_path) -> None:
    layouts = ["1x2x1", "1x1x2"]
    work(tmp_path, 2, *(["train", recipe, layout(each), {"run": str(tmp_path / each)}] for each in layouts))
    for each in layouts:
        run = Run(tmp_path / each)
        assert gap(run, alone) < 1e-9 and gap(run, alone, "router_loss") < 1e-9 and gap(run, alone, "grad_norm") < 1e-7, each
        for name, tensor in run.newest().tensors.items():
            assert torch.allclose(tensor.load(), alone.newest().tensors[name].load(), rtol=0, atol=1e-7), (each, name)
