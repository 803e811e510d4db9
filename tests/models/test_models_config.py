"""Architectures: closed forms, config.json there and back, refusals in plain sentences."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from models_drawing import DECODERS, architectures
from torch.utils.flop_counter import FlopCounterMode

from cairn import catalog
from cairn.errors import InputError, MismatchError, NotFoundError
from cairn.models.config import Architecture, architecture
from cairn.models.families.llama import Llama
from cairn.models.families.olmo2 import Olmo2

DMAS = {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 5120}


def test_parameter_counts_of_the_1_7b_run() -> None:
    assert Llama(vocab_size=50304, **DMAS).parameter_count() == 1_716_144_128
    assert Llama(vocab_size=50257, **DMAS).parameter_count() == 1_715_951_616


@given(architectures())
@settings(max_examples=40, deadline=None)
def test_parameter_count_is_that_of_the_network(a: Architecture) -> None:
    assert a.parameter_count() == sum(p.numel() for p in a.meta_model().parameters())


@given(architectures())
@settings(max_examples=40, deadline=None)
def test_config_json_round_trip(a: Architecture) -> None:
    config = json.loads(json.dumps(a.to_hf()))
    again = architecture(config)
    assert type(again) is type(a) and again.to_hf() == a.to_hf()


@given(architectures())
@settings(max_examples=15, deadline=None)
def test_matmul_flops_are_those_that_torch_counts(a: Architecture) -> None:
    length = 12
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        a.meta_model()(torch.zeros(1, length, dtype=torch.int64))
    assert a.matmul_flops(length, causal=False) == counter.get_total_flops()
    windows = getattr(a, "windows", [None] * a.num_hidden_layers)
    unseen = sum(length - min(query + 1, window or length) for window in windows for query in range(length))
    assert counter.get_total_flops() - a.matmul_flops(length) == 4 * a.num_attention_heads * a.head_size * unseen
    assert a.flops_per_token(length) * length == 3 * a.matmul_flops(length)


def test_transformers_reads_our_config_and_we_read_its() -> None:
    transformers = pytest.importorskip("transformers")
    ours = Llama(vocab_size=99, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}, num_key_value_heads=2, eos_token_id=[1, 2])
    config = transformers.LlamaConfig(**ours.to_hf())
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert Llama.from_hf(config.to_dict()).to_hf() == ours.to_hf()


def test_a_config_of_older_transformers_is_read() -> None:
    old = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "rope_theta": 500000.0, "rope_scaling": None, "torch_dtype": "bfloat16"}
    assert Llama.from_hf(old).rope_theta == 500000.0
    scaled = {**old, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
    assert Llama.from_hf(scaled).rope_scaling == {"rope_type": "dynamic", "factor": 4.0}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"hidden_size": 65}, "not a multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"head_dim": 7}, "even size"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "'spiral' is not known"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "needs low_freq_factor and high_freq_factor"),
        ({"hidden_sise": 64}, "Did you mean 'hidden_size'"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_bad_sizes_are_refused_in_a_sentence(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Llama.parse(values, "model")


@pytest.mark.parametrize(
    "values", [{"hidden_act": "gelu"}, {"attention_dropout": 0.1}, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}]
)
def test_a_config_that_asks_for_another_network_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(MismatchError, match="not supported"):
        Llama.from_hf({**Llama().to_hf(), **values})


def test_families_are_in_the_catalog() -> None:
    assert {"llama", "olmo2"} <= set(catalog.names("architecture"))
    with pytest.raises(NotFoundError, match="llama"):
        architecture({"model_type": "lama"})
    with pytest.raises(InputError, match="no biases"):
        Olmo2.parse({"mlp_bias": True})


def test_describing_a_model_does_not_load_torch() -> None:
    code = "import sys; from cairn.models.families.llama import Llama; Llama().parameter_count(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_training_memory_counts_weights_gradients_and_moments_exactly() -> None:
    a = Llama(vocab_size=50304, **DMAS)
    memory = a.training_memory(8, 1024)
    assert memory["weights"] == memory["gradients"] == memory["optimizer"] // 2 == 4 * 1_716_144_128
    assert a.training_memory(16, 1024)["activations"] == 2 * memory["activations"]
    assert a.cache_bytes(100, 2) == 2 * 36 * 8 * 64 * 100 * 2


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_a_config_that_is_silent_means_what_it_means_to_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    ours, theirs = DECODERS[name].from_hf({"model_type": name}), DECODERS[name].from_hf(transformers.AutoConfig.for_model(name).to_dict())
    ids = {"bos_token_id", "eos_token_id", "pad_token_id"}  # the tokenizer's to say
    assert {k: v for k, v in ours.to_hf().items() if k not in ids} == {k: v for k, v in theirs.to_hf().items() if k not in ids}
