"""Anatomy names the parts of our models and of transformers' models whatever their naming style."""

from __future__ import annotations

import pytest
import torch

from cairn.errors import MismatchError
from cairn.models.anatomy import anatomy, anatomy_of_config
from cairn.models.families.llama import Llama
from cairn.models.families.olmo2 import Olmo2
from cairn.models.families.t5 import T5
from cairn.models.families.umt5 import UMT5

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
FLAT = {"intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SEPARATE = ["mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo", "olmo2", "llama", "stablelm", "cohere", "granite", "smollm3"]
PLAIN_MLP = ["opt", "phi", "starcoder2", "gptj", "gpt_neo", "biogpt", "xglm"]
FUSED = ["gpt2", "gpt_neox", "bloom", "falcon", "codegen", "mpt"]
EXTRA = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_inner": 48},
    "gptj": {"n_inner": 48, "rotary_dim": 4},
    "codegen": {"n_inner": 48, "rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4},
}


def model(name: str) -> torch.nn.Module:
    config = transformers.AutoConfig.for_model(name, **SIZES, **FLAT, **EXTRA.get(name, {}))
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", SEPARATE + PLAIN_MLP + FUSED + ["phi3", "glm"])
def test_every_matrix_of_a_transformers_model_has_its_place(name: str) -> None:
    network = model(name)
    parts = anatomy(network)
    names = {n for n, _ in network.named_parameters(remove_duplicate=False)}
    assert len(parts.blocks) == 2 and parts.width == 32 and parts.vocabulary == 64
    assert {parts.embedding, parts.head} <= names and parts.final_norm is not None
    shapes = {n: tuple(p.shape) for n, p in network.named_parameters(remove_duplicate=False)}
    for index, block in enumerate(parts.blocks):
        found = block.matrices()
        for matrix in found.values():
            stored = shapes[matrix.weight]
            assert stored == ((matrix.inputs, matrix.outputs) if matrix.transposed else (matrix.outputs, matrix.inputs))
            assert parts.block_of(matrix.weight) == index
        # Nothing two-dimensional in the block is left out or named twice.
        in_block = {n for n, shape in shapes.items() if n.startswith(f"{block.name}.") and len(shape) == 2}
        assert {m.weight for m in found.values()} == in_block and len(found) == len(in_block)
        assert block.o is not None and block.o.outputs == 32 and block.down is not None and block.down.outputs == 32
    assert parts.tied == (network.get_output_embeddings().weight is network.get_input_embeddings().weight)


@pytest.mark.parametrize("name", SEPARATE)
def test_gated_models_have_separate_projections_with_the_right_sizes(name: str) -> None:
    block = anatomy(model(name)).blocks[1]
    assert set(block.matrices()) == {"q", "k", "v", "o", "gate", "up", "down"}
    assert block.q is not None and block.k is not None and block.v is not None and block.gate is not None and block.down is not None
    assert block.k.outputs == block.v.outputs == block.q.outputs // 2
    assert block.gate.outputs == block.down.inputs == 48
    assert block.q.weight.endswith("q_proj.weight") and block.v.weight.endswith("v_proj.weight") and block.gate.weight.endswith("gate_proj.weight")


@pytest.mark.parametrize(("name", "parts"), [("gpt2", {"qkv", "o", "up", "down"}), ("opt", {"q", "k", "v", "o", "up", "down"})])
def test_other_styles(name: str, parts: set[str]) -> None:
    found = anatomy(model(name))
    assert set(found.blocks[0].matrices()) == parts
    assert found.positions is not None and found.tied


def test_fused_gate_and_transposed_weights_are_told() -> None:
    phi3 = anatomy(model("phi3")).blocks[0]
    assert phi3.gate_up is not None and phi3.gate_up.outputs == 96 and phi3.qkv is not None
    gpt2 = anatomy(model("gpt2")).blocks[0]
    assert gpt2.qkv is not None and gpt2.qkv.transposed and (gpt2.qkv.outputs, gpt2.qkv.inputs) == (96, 32)


def test_experts_have_no_single_matrices_and_a_model_without_attention_is_refused() -> None:
    mixtral = anatomy(model("mixtral")).blocks[0]
    assert set(mixtral.matrices()) == {"q", "k", "v", "o"} and mixtral.mlp.endswith(".mlp")
    with pytest.raises(MismatchError, match="no attention"):
        anatomy(model("mamba"))


@pytest.mark.parametrize("family", [Llama, Olmo2])
@pytest.mark.parametrize("tied", [False, True])
def test_ours_is_the_same_as_transformers(family: type[Llama], tied: bool) -> None:
    ours = family(**SIZES, intermediate_size=48, tie_word_embeddings=tied)
    mine = anatomy(ours.meta_model())
    config = transformers.AutoConfig.for_model(ours.model_type, **{k: v for k, v in ours.to_hf().items() if k != "model_type"})
    with torch.device("meta"):
        theirs = anatomy(transformers.AutoModelForCausalLM.from_config(config))
    assert {n for block in mine.blocks for n in block.norms} == {n for block in theirs.blocks for n in block.norms}
    assert [block.matrices() for block in mine.blocks] == [block.matrices() for block in theirs.blocks]
    assert (mine.embedding, mine.head, mine.tied, mine.final_norm) == (theirs.embedding, theirs.head, theirs.tied, theirs.final_norm)
    assert mine.tied is tied and anatomy_of_config(ours.to_hf()) == mine


@pytest.mark.parametrize("name", ["t5", "umt5", "bart", "mbart"])
def test_an_encoder_decoder_has_two_stacks_and_a_second_attention(name: str) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
    sizes = sizes if "t5" in name else {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = transformers.AutoConfig.for_model(name, vocab_size=64, **sizes)
    with torch.device("meta"):
        network = transformers.AutoModelForSeq2SeqLM.from_config(config)
    parts = anatomy(network)
    assert len(parts.blocks) == 4 and [block.cross is None for block in parts.blocks] == [True, True, False, False]
    shapes = {n: tuple(p.shape) for n, p in network.named_parameters(remove_duplicate=False) if "relative_attention_bias" not in n}
    for block in parts.blocks:
        in_block = {n for n, shape in shapes.items() if n.startswith(f"{block.name}.") and len(shape) == 2}
        assert {m.weight for m in block.matrices().values()} == in_block and block.down is not None and block.down.outputs == 32
        assert block.cross is None or (block.cross_q is not None and block.cross_q.weight.startswith(f"{block.cross}."))
    assert (parts.width, parts.vocabulary) == (32, 64)
    assert anatomy_of_config(config.to_dict()) == parts or name in ("t5", "umt5")


@pytest.mark.parametrize("family", [T5, UMT5])
@pytest.mark.parametrize("tied", [False, True])
def test_our_encoder_decoder_is_the_same_as_transformers(family: type[T5], tied: bool) -> None:
    a = family(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, tie_word_embeddings=tied)
    with torch.device("meta"):
        theirs = anatomy(transformers.AutoModelForSeq2SeqLM.from_config(transformers.AutoConfig.for_model(**a.to_hf())))
    ours = anatomy_of_config(a.to_hf())
    assert ours.blocks == theirs.blocks and ours.final_norm == theirs.final_norm == "decoder.final_layer_norm"
    assert ours.tied == tied and ours.embedding == theirs.embedding == "shared.weight"
    assert ours.blocks[2].mlp == "decoder.block.0.layer.2.DenseReluDense" and ours.blocks[0].attention == "encoder.block.0.layer.0.SelfAttention"
