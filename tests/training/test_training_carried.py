"""What travels with a checkpoint besides its weights survives whatever goes on with it: training of every kind, growth, operations, exports."""

import json
import shutil

import pytest
import torch

from cairn.adaptation.folding import fold
from cairn.checkpoint.foreign.export import copy, export, export_dcp
from cairn.checkpoint.foreign.importing import import_
from cairn.checkpoint.format import read
from cairn.checkpoint.format.carried import luggage
from cairn.continual.pretrain import anneal, continue_
from cairn.data.text.tokenizer import byte_level
from cairn.growth.enlarge import grow
from cairn.merging.combine import average, merge
from cairn.training.run import fork, resume, train

LUGGAGE = {
    "chat_template.jinja": b"{% for m in messages %}{{ m.content }}{% endfor %}",
    "generation_config.json": b'{"eos_token_id": [256, 10], "temperature": 0.5}',
    "tokenizer.model": b"sentencepiece",
    "special_tokens_map.json": b'{"eos_token": "<|endoftext|>"}',
}
SIZES = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}


def arrived(path):
    return {name: (path / name).read_bytes() for name in LUGGAGE if (path / name).is_file()}


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A directory as transformers writes it, with a template, generation settings and further files of its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("foreign") / "llama"
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True, eos_token_id=256)).save_pretrained(path)
    byte_level().save(path)
    for name, data in LUGGAGE.items():
        (path / name).write_bytes(data)
    return path


@pytest.fixture(scope="module")
def recipe(small_recipe):
    short = {**small_recipe["training"], "tokens": "4 steps", "batch": 64}
    return {**small_recipe, "model": {"name": "llama"}, "training": short, "checkpoint": {"every": "2 steps"}}


@pytest.fixture(scope="module")
def forked(parent, recipe, tmp_path_factory):
    """A run that goes on from the directory, stopped half way and resumed."""
    run = fork(parent, tmp_path_factory.mktemp("forked") / "run", recipe=recipe, fresh=["optimizer"], stop_at_step=2)
    return resume(run.path)


def test_a_fork_and_a_resumed_run_carry_what_their_parent_carried(parent, forked):
    assert [arrived(path) for path in forked.checkpoints()] == [LUGGAGE] * 2
    assert forked.newest().tokenizer.end_ids == read.open(parent).tokenizer.end_ids == {256, 10}
    assert sorted(luggage(forked.newest())) == sorted([*LUGGAGE, "tokenizer.json", "tokenizer_config.json"])


def stages(parent, recipe):
    branch = {"from": "web", "fresh": ["optimizer"]}
    branches = [{**branch, "name": f"on-{seed}", "set": {"training.tokens": "2 steps", "schedule": "linear", "seed": seed}} for seed in (1, 2)]
    soup = {"name": "soup", "from": ["on-1", "on-2"], "operation": "average"}
    return {**recipe, "model": {"name": "llama", **SIZES, "tie_word_embeddings": True}, "stages": [{"name": "web", "checkpoint": str(parent)}, *branches, soup]}


MAKERS = {
    "continue": lambda parent, run, recipe, out: continue_(run.path, out, {"more": recipe["data"]["sources"]["walks"]["corpus"]}, "1 steps").newest(),
    "anneal": lambda parent, run, recipe, out: anneal(run.checkpoints()[0], out, "1 steps", final=0.01).newest(),
    "fork again": lambda parent, run, recipe, out: fork(run.path, out, ["training.tokens=5 steps"]).newest(),
    "another objective": lambda parent, run, recipe, out: fork(run.path, out, ["training.tokens=5 steps", "objective=prefix-lm"]).newest(),
    "some parameters": lambda parent, run, recipe, out: fork(parent, out, recipe={**recipe, "trainable": ["*norm*"]}, fresh=["optimizer"]).newest(),
    "stages": lambda parent, run, recipe, out: read.open(train(stages(parent, recipe), out).path),
    "growth": lambda parent, run, recipe, out: grow("stack", run.path, out, {"factor": 2}),
    "merge": lambda parent, run, recipe, out: merge("slerp", run.checkpoints(), out, {"t": 0.5}),
    "average": lambda parent, run, recipe, out: average(run.checkpoints(), out),
    "export": lambda parent, run, recipe, out: export(run.path, out, dtype="bfloat16"),
    "copy": lambda parent, run, recipe, out: copy(run.path, out),
    "import": lambda parent, run, recipe, out: import_(parent, out),
}


@pytest.mark.parametrize("act", MAKERS)
def test_it_survives(act, parent, forked, recipe, tmp_path):
    made = MAKERS[act](parent, forked, recipe, tmp_path / "out")
    assert arrived(made.path) == LUGGAGE


def test_it_survives_an_export_for_torch(forked, tmp_path):
    export_dcp(forked.path, tmp_path / "dcp")
    assert arrived(tmp_path / "dcp") == LUGGAGE


def test_an_adapter_carries_what_its_base_carries_and_so_does_what_it_is_folded_into(parent, recipe, tmp_path):
    run = fork(parent, tmp_path / "run", recipe={**recipe, "adapter": {"name": "lora", "rank": 2}})
    assert arrived(run.newest().path) == LUGGAGE
    assert arrived(fold(run.path, tmp_path / "folded").path) == LUGGAGE


def test_the_template_that_an_adapter_was_trained_with_comes_out_of_the_fold(parent, recipe, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(parent)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "peft")
    folded = fold(tmp_path / "peft", tmp_path / "plain", base=parent)
    assert arrived(folded.path) == LUGGAGE  # PEFT's own files say nothing of it
    (tmp_path / "peft" / "chat_template.jinja").write_bytes(b"{{ messages }}")
    assert arrived(fold(tmp_path / "peft", tmp_path / "chat", base=parent).path) == LUGGAGE | {"chat_template.jinja": b"{{ messages }}"}


def test_a_list_of_added_tokens_is_left_behind_where_an_objective_adds_more(parent, recipe, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    path = shutil.copytree(parent, tmp_path / "parent")
    (path / "added_tokens.json").write_text(json.dumps({"<|endoftext|>": 256}))
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 400}, tie_word_embeddings=True)).save_pretrained(path)
    for name, data in LUGGAGE.items():
        (path / name).write_bytes(data)
    once = fork(path, tmp_path / "once", recipe=recipe, fresh=["optimizer"], stop_at_step=1).newest()
    more = fork(path, tmp_path / "more", recipe={**recipe, "objective": "span-corruption"}, fresh=["optimizer"], stop_at_step=1).newest()
    assert (once.path / "added_tokens.json").exists() and not (more.path / "added_tokens.json").exists()
    assert arrived(more.path) == LUGGAGE
