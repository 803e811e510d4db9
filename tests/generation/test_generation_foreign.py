"""Families that only transformers builds: its own text, its own ends, its current interface, and nothing that is not causal."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from cairn.checkpoint.format import read
from cairn.errors import InputError
from cairn.evaluation.engine import Engine
from cairn.generation import limits
from cairn.generation.sample import generate, generate_texts
from cairn.generation.text import generate as write
from tests import tokenizer_kinds as kinds

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 420, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}


def model_of(family: str, **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = SMALL | {"intermediate_size": 64, "max_position_embeddings": 64} | more
    if family in ("llama", "qwen2", "mistral", "stablelm"):
        sizes["num_key_value_heads"] = 2
    if family == "gpt2":
        sizes = {"vocab_size": 420, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3, **more}
    config = transformers.AutoConfig.for_model(family, bos_token_id=1, eos_token_id=2, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def saved(folder: Path, family: str = "qwen2", kind: str = "metaspace", **more: Any) -> Path:
    model_of(family, **more).save_pretrained(folder)
    return kinds.write(kind, folder)


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("metaspace", "llama"),
        ("metaspace", "mistral"),
        ("byte_level", "llama"),
        ("byte_level", "qwen2"),
        ("byte_level", "gpt2"),
        ("byte_level", "gpt_neox"),
        ("byte_level", "phi"),
    ],
)
def test_text_is_what_transformers_writes(tmp_path: Path, family: str, kind: str) -> None:
    folder = saved(tmp_path, family, kind)
    theirs, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for prompt in ("First Citizen", "The quick brown", "way"):
        ids = tokenizer(prompt, return_tensors="pt")
        new = theirs.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
        whole, begun = (tokenizer.decode(each, skip_special_tokens=True) for each in (new, ids.input_ids[0]))
        assert begun + write(folder, prompt, new_tokens=12, temperature=0) == whole


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi"])
def test_every_end_of_the_files_ends_a_text_in_every_path(tmp_path: Path, family: str) -> None:
    folder = saved(tmp_path, family)
    opened = read.open(folder)
    prompt = opened.tokenizer.prompt("First Citizen")
    whole = generate(opened.model(), prompt, max_new_tokens=12, temperature=0)
    end = whole[4]
    at = whole.index(end)
    for name, value in (("config.json", end), ("generation_config.json", [2, end])):
        before = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(before | {"eos_token_id": value}))
        again = read.open(folder)
        model, tokenizer = again.model(), again.tokenizer
        wanted = tokenizer.continuation(prompt, whole[:at])
        assert end in limits.end_ids(model, tokenizer)
        assert write(folder, "First Citizen", new_tokens=12, temperature=0) == wanted
        assert Engine(model, tokenizer).generate(["First Citizen"], max_new_tokens=12) == [wanted]
        (folder / name).write_text(json.dumps(before))


@pytest.mark.parametrize("stop", ["{token}", "{token}\n", "zz{token}"])
def test_a_stop_with_a_token_that_is_no_text_stops(stop: str) -> None:
    """A model that writes one sequence whatever it reads: `<|im_end|>` after five letters, then a line break."""
    from cairn.data.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(kinds.byte_level(), kinds.config("byte_level"))
    told = [*tokenizer.encode("abczz"), *tokenizer.encode("<|im_end|>"), *tokenizer.encode("\nand so on")]

    class Parrot(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.config = transformers.AutoConfig.for_model("gpt2", vocab_size=420, n_positions=64, bos_token_id=None, eos_token_id=None)

        def get_input_embeddings(self) -> Any:
            return torch.nn.Embedding(420, 2)

        def forward(self, input_ids: Any, use_cache: bool = False) -> Any:
            place = torch.arange(input_ids.shape[1]).clamp(max=len(told))
            nexts = torch.tensor([*told, 0])[(place - 1).clamp(min=0)]
            return transformers.modeling_outputs.CausalLMOutput(logits=torch.nn.functional.one_hot(nexts, 420)[None].float())

    wanted = "abc" if stop.startswith("zz") else "abczz"
    found = generate_texts(Parrot(), tokenizer, [tokenizer.encode("xy")], stop=[stop.format(token="<|im_end|>")], max_new_tokens=20, temperature=0)
    assert found == [wanted]


# -- what is no causal language model -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_a_model_that_reads_both_ways_is_refused_by_scoring_and_by_writing(family: str) -> None:
    model = model_of(family)
    with pytest.raises(InputError, match="both directions"):
        Engine(model)
    with pytest.raises(InputError, match="both directions"):
        generate(model, [1, 2, 3], max_new_tokens=2)


def test_a_causal_family_told_to_read_both_ways_is_refused() -> None:
    model = model_of("qwen2")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(InputError, match="both directions"):
        Engine(model)


@pytest.mark.parametrize("kind", ["OPTForSequenceClassification", "OPTForQuestionAnswering"])
def test_a_classifier_whose_head_is_that_of_no_language_model_is_refused(kind: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.OPTConfig(vocab_size=420, max_position_embeddings=64, **sizes)
    getattr(transformers, kind)(config).save_pretrained(tmp_path)
    kinds.write("byte_level", tmp_path)
    with pytest.raises(InputError, match=f"{kind}: the model was trained to judge"):
        write(tmp_path, "First", new_tokens=2)


def test_an_encoder_decoder_that_only_transformers_builds_is_refused(tmp_path: Path) -> None:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = transformers.BartConfig(vocab_size=420, d_model=32, max_position_embeddings=64, **sizes)
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path)
    kinds.write("byte_level", tmp_path)
    with pytest.raises(InputError):
        write(tmp_path, "First", new_tokens=2)


# -- bounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "phi"])
def test_what_the_model_does_not_have_is_one_sentence_before_anything_is_computed(family: str) -> None:
    model = model_of(family)
    limits.require_causal(model)
    model.forward = lambda *_, **__: pytest.fail("computed")
    for ids, new, sentence in (([1, 420], 2, "token 420"), ([-1], 2, "token -1"), (list(range(60)), 10, "the model has 64"), ([1], 64, "at most 63")):
        with pytest.raises(InputError, match=sentence):
            generate(model, ids, max_new_tokens=new)


def test_scores_of_ids_beyond_the_embedding_are_refused() -> None:
    for model in (model_of("qwen2"), model_of("gpt2")):
        engine = Engine(model)
        for call in (engine.score, engine.token_scores, engine.score_rolling):
            with pytest.raises(InputError, match="vocabulary ends at 419"):
                call([[1, 2], [3, 420, 4]])


# -- the interface of transformers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "phi", "stablelm", "gpt_neox", "mamba"])
def test_no_warning_of_transformers_stands_in_the_way(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Loading, scoring and writing use its current interface: any warning is an error here, also those that it only logs."""
    more = {"vocab_size": 420, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4} if family == "mamba" else {}
    if family == "mamba":
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("mamba", **more)).eval()
        model.save_pretrained(tmp_path)
        kinds.write("metaspace", tmp_path)
    else:
        saved(tmp_path, family)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        opened = read.open(tmp_path)
        model = opened.model()
        Engine(model, opened.tokenizer).loglikelihood([("First", " Citizen"), ("", "way")])
        generate(model, [[1, 5, 9], [1, 7]], max_new_tokens=4, temperature=0)
    assert not [record for record in caplog.records if "deprecat" in record.message.lower()]


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "phi"])
def test_the_cache_of_a_family_is_used(family: str) -> None:
    """Each new token costs one position, and says what reading everything again says."""
    model, read_positions = model_of(family), []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: read_positions.append(args[0].shape[-1]))
    found = generate(model, [1, 5, 9, 4], max_new_tokens=6, temperature=0)
    hook.remove()
    assert read_positions[-6:] == [4, 1, 1, 1, 1, 1]
    ids = [1, 5, 9, 4]
    for token in found:
        assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
