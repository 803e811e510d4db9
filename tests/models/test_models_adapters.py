"""The container of adapters: on any model the same as PEFT's, files that go both ways, merging that can be taken back, dropout by samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cairn import randomness
from cairn.errors import InputError, MismatchError
from cairn.models.adapters.container import attach, attach_stored
from cairn.models.adapters.layer import drawn
from cairn.models.adapters.lora import LoRA, low_rank, low_rank_delta
from cairn.models.adapters.targets import matrices_for, parameters_for
from cairn.models.anatomy import anatomy
from cairn.models.families.llama import Llama
from cairn.models.families.t5 import T5

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
SIZES |= {"max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = ["qwen2", "gpt_neox", "gpt2"]
IDS = torch.arange(18).reshape(2, 9)


def network(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **SIZES)).eval()


def stirred(adapted, seed=1):
    """The adapter with values in both of its matrices, so that it changes something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.named_parameters().values():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return adapted


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def saved(adapted, folder: Path) -> Path:
    folder.mkdir()
    save_file(adapted.tensors(), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(adapted.config()))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_our_files_and_computes_the_same(family, tmp_path):
    model = network(family)
    before = logits(model)
    adapted = attach(model, LoRA(rank=4, alpha=6))
    assert torch.equal(logits(model), before), "at the start nothing changes, to the last bit"
    after = logits(stirred(adapted).model)
    assert (after - before).abs().max() > 1e-2
    theirs = peft.PeftModel.from_pretrained(network(family), saved(adapted, tmp_path / "a")).eval()
    assert (logits(theirs) - after).abs().max() < 1e-6
    assert set(peft.get_peft_model_state_dict(theirs)) == set(adapted.tensors())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stabilized", [False, True])
def test_we_load_what_peft_has_written(family, stabilized, tmp_path):
    targets = {"qwen2": ["q_proj", "down_proj"], "gpt_neox": ["query_key_value"], "gpt2": ["c_attn", "mlp.c_proj"]}[family]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_rslora=stabilized, task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2")
    theirs = peft.get_peft_model(network(family), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "peft")
    model = network(family)
    stored = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    adapted = attach_stored(model, stored, load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    assert (logits(model) - logits(theirs)).abs().max() < 1e-6
    adapted.merge()
    merged = theirs.merge_and_unload()
    assert (logits(model) - logits(merged)).abs().max() < 1e-6


@settings(max_examples=25)
@given(
    rank=st.integers(1, 40),
    alpha=st.floats(0.1, 50),
    targets=st.lists(st.sampled_from(["q", "k", "v", "o", "gate", "up", "down", "attention", "mlp", "all", "q_proj", "model.layers.1.*"]), min_size=1),
    tied=st.booleans(),
)
def test_merging_gives_the_forward_pass_and_can_be_taken_back(rank, alpha, targets, tied):
    """Properties: 0 at the start; merged = beside, within rounding; unmerged and detached = before, bit for bit; bytes by the formula."""
    model = Llama(**SIZES, tie_word_embeddings=tied, initializer_range=0.2).build(seed=3).eval()
    names, before, plain = list(model.state_dict()), {n: t.clone() for n, t in model.state_dict().items()}, logits(model)
    parts = anatomy(model)
    adapter = LoRA(rank=rank, alpha=alpha, targets=targets)
    adapted = attach(model, adapter, seed=5)
    assert torch.equal(logits(model), plain) and anatomy(model) == parts
    matrices = matrices_for(parts, targets)
    assert adapted.nbytes == 4 * rank * sum(m.inputs + m.outputs for m in matrices.values()) == 4 * sum(map(adapter.count, matrices.values()))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"{m}.adapter.{own}" for m in matrices for own in ("lora_A", "lora_B")}
    stirred(adapted)
    beside = logits(model)
    adapted.merge()
    assert torch.allclose(logits(model), beside, rtol=1e-5, atol=1e-4 * float(beside.abs().max()))
    adapted.unmerge()
    assert torch.equal(logits(model), beside)
    adapted.detach()
    assert list(model.state_dict()) == names and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters()) and torch.equal(logits(model), plain)


def test_the_formula_is_that_of_the_full_matrices():
    x, a, b = (torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate([(3, 5, 7), (2, 7), (4, 2)]))
    assert torch.allclose(low_rank(x, a, b, 1.5), x @ low_rank_delta(a, b, 1.5).T, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(low_rank_delta(a, b, 1.5)) == 2


def test_first_values_are_those_of_peft_in_distribution_and_do_not_depend_on_other_targets():
    model = Llama(**SIZES).build().eval()
    first = attach(model, LoRA(rank=40, targets=["q"]), seed=1)
    a = first.named_parameters()["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].detach().clone()
    first.detach()
    again = attach(model, LoRA(rank=40, targets=["all"]), seed=1).named_parameters()
    assert torch.equal(again["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"], a)
    bound = 1 / 32**0.5
    assert a.abs().max() <= bound and abs(float(a.var()) - bound**2 / 3) < 0.1 * bound**2 / 3
    assert all(not tensor.any() for name, tensor in again.items() if "lora_B" in name)


def test_an_encoder_decoder_takes_an_adapter_on_all_three_attentions():
    model = T5(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, eos_token_id=2).build().eval()
    adapted = attach(model, LoRA(rank=2, targets=["attention"]))
    assert len(adapted.matrices) == 2 * 4 + 2 * 8
    stirred(adapted)
    with torch.no_grad():
        beside = model(IDS, decoder_input_ids=IDS).logits
        adapted.merge()
        assert torch.allclose(model(IDS, decoder_input_ids=IDS).logits, beside, atol=1e-4)


def test_dropout_depends_on_the_sample_alone():
    """The mask of a sample is the same in any batch, and is the number that the room of randomness defines."""
    stream, samples = torch.tensor(12345), torch.tensor([3, 9, 4])
    together = drawn(stream, samples, (5, 7), 0.3)
    alone = torch.cat([drawn(stream, samples[i : i + 1], (5, 7), 0.3) for i in range(3)])
    assert torch.equal(together, alone)
    counters = np.array([3, 9, 4])[:, None] * 35 + np.arange(35)
    assert np.array_equal(together.numpy().reshape(3, 35), randomness.uniform(12345, counters) >= 0.3)
    assert abs(float(drawn(stream, torch.arange(100), (50, 20), 0.3).float().mean()) - 0.7) < 0.01
    model = Llama(**SIZES).build()
    adapted = stirred(attach(model, LoRA(rank=2, dropout=0.5)))
    adapted.samples({name: 1 for name in adapted.matrices}, torch.tensor([7, 8]))
    both = logits(model.train())
    adapted.samples({name: 1 for name in adapted.matrices}, torch.tensor([8]))
    assert torch.allclose(logits(model, IDS[1:]), both[1:], atol=1e-6)
    adapted.samples({name: 2 for name in adapted.matrices}, torch.tensor([8]))
    assert not torch.allclose(logits(model, IDS[1:]), both[1:], atol=1e-3), "another step draws another mask"
    assert torch.equal(logits(model.eval()), logits(model))


@pytest.mark.parametrize(
    ("family", "targets", "sentence"),
    [
        ("qwen2", ["qproj"], r"'qproj' matches no matrix.*Did you mean 'q_proj'\?"),
        ("qwen2", ["atention"], r"Did you mean 'attention'\?"),
        ("gpt_neox", ["q"], r"'q' matches no matrix.*Its matrices are qkv, o, up, down"),
        ("qwen2", ["model.layers.7.*"], r"'model\.layers\.7\.\*' matches no matrix"),
        ("qwen2", ["lm_head"], r"'lm_head' matches no matrix in the blocks"),
    ],
)
def test_a_target_that_means_nothing_is_refused_with_the_near_names(family, targets, sentence):
    model = network(family)
    with pytest.raises(InputError, match=sentence):
        attach(model, LoRA(targets=targets))
    assert all(parameter.requires_grad for parameter in model.parameters()), "nothing was touched"


def test_bad_options_and_files_are_told_in_one_sentence():
    model = network("qwen2")
    for options, sentence in [
        ({"rank": 0}, "rank"),
        ({"targets": []}, "targets"),
        ({"dropout": 1.0}, "dropout"),
        ({"alpha": 0}, "alpha"),
        ({"rnk": 2}, "'rank'"),
    ]:
        with pytest.raises(InputError, match=sentence):
            LoRA.parse(options, "adapter 'lora'")
    adapted = stirred(attach(model, LoRA(rank=2)))
    with pytest.raises(InputError, match="has an adapter already"):
        attach(model, LoRA(rank=2))
    config, tensors = adapted.config(), adapted.tensors()
    for change, sentence in [
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"r": 3}, "is \\(2, 32\\), not \\(3, 32\\)"),
        ({"bias": "all"}, "bias"),
    ]:
        with pytest.raises((InputError, MismatchError), match=sentence):
            attach_stored(network("qwen2"), config | change, tensors)
    with pytest.raises(MismatchError, match="another family or size"):
        attach_stored(network("gpt_neox"), config, tensors)
    with pytest.raises(MismatchError, match="only in one of them"):
        attach_stored(network("qwen2"), config, dict(list(tensors.items())[1:]))


def test_patterns_of_parameters_mean_parameters_and_whole_modules():
    names = list(dict(Llama(**SIZES).meta_model().named_parameters()))
    assert parameters_for(names, ["norm"]) == ["model.norm.weight"]
    assert parameters_for(names, ["*norm"]) == [name for name in names if "norm" in name]
    assert parameters_for(names, ["layers.1"]) == [name for name in names if ".layers.1." in name]
    assert parameters_for(names, ["lm_head", "embed_tokens"]) == ["model.embed_tokens.weight", "lm_head.weight"]
    with pytest.raises(InputError, match=r"trainable: 'lm_hed' matches no parameter.*Did you mean 'lm_head'\?"):
        parameters_for(names, ["norm", "lm_hed"])
