"""A practitioner's first hour, without a recipe: continue an open checkpoint, lose the process, go on, combine, write, hand on."""

from __future__ import annotations

import json
import math

import pytest
import torch

import cairn
from cairn.errors import InputError, ResumeError
from cairn.training import state
from cairn.training.starting import init, to_continue
from tests.faults import kill_when, python

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 0}
SOURCES = {
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, tie_word_embeddings=True),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**GROUPED, sliding_window=8, pad_token_id=None),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES, bos_token_id=0, eos_token_id=0),
    "phi": lambda: transformers.PhiConfig(**SIZES, bos_token_id=0, eos_token_id=0),  # only transformers builds it
}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "my foxes.txt"
    path.write_text("\n\n".join(f"Once upon a time there was fox number {i}, who liked {i * 7 % 13} hens." for i in range(200)))
    return path


@pytest.fixture(scope="module")
def open_checkpoint(text, tmp_path_factory):
    """A bfloat16 directory as transformers writes it, by family."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text.read_text()], trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"]))
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", chat_template=TEMPLATE)
    home = tmp_path_factory.mktemp("open")

    def make(family):
        path = home / family
        if not path.exists():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(SOURCES[family](), dtype=torch.bfloat16)
            model.generation_config.temperature, model.generation_config.do_sample = 0.5, True
            model.save_pretrained(path)
            wrapped.save_pretrained(path)
        return path

    return make


@pytest.mark.parametrize("family", sorted(SOURCES))
def test_the_journey_needs_no_recipe(family, open_checkpoint, text, tmp_path):
    source = open_checkpoint(family)
    words = {"overrides": ["checkpoint.every=4 steps"], "rate": 1e-2, "tokens": "8 steps"}
    run = cairn.continue_(source, tmp_path / "run", {"foxes": text}, **words, stop_at_step=4)
    begun = run.newest()
    assert run.recipe.checkpoint.dtype == "bfloat16" and run.recipe.data.tokenizer == str(source)
    whole = cairn.continue_(source, tmp_path / "whole", {"foxes": text}, **words)
    resumed = cairn.resume(run.path)
    newest = resumed.newest()
    assert newest.digest == whole.newest().digest != begun.digest
    losses = [row["loss"] for row in resumed.metrics()]
    assert losses[-1] < losses[0]

    # As it came: dtype, ties, template, settings and end tokens; the float32 weights are the optimizer's.
    assert {tensor.dtype for tensor in newest.tensors.values()} == {torch.bfloat16} and newest.config["dtype"] == "bfloat16"
    assert ("lm_head.weight" in newest.tensors) == ("lm_head.weight" in cairn.open(source).tensors)
    there = json.loads((source / "config.json").read_text())
    assert {key: newest.config.get(key) for key in ("eos_token_id", "bos_token_id")} == {key: there.get(key) for key in ("eos_token_id", "bos_token_id")}
    assert (newest.path / "chat_template.jinja").read_text() == TEMPLATE and newest.generation["temperature"] == 0.5
    for name, tensor in newest.tensors.items():
        assert torch.equal(newest.optimizer[f"{name}/master"].load().to(torch.bfloat16), tensor.load())

    average = cairn.merge("average", [source, newest.path], tmp_path / "average")
    ties = cairn.merge("ties", [newest.path, average.path], tmp_path / "ties", base=source)
    for made in (average, ties):
        assert {tensor.dtype for tensor in made.tensors.values()} == {torch.bfloat16}
    written = cairn.generate(ties.path, "Once upon", new_tokens=4, temperature=0)
    assert written
    cairn.export(ties, tmp_path / "out")
    theirs, ids = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32), torch.arange(20)[None]
    assert type(theirs.config) is type(SOURCES[family]())
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ties.model(dtype=torch.float32)(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_killed_process_loses_nothing_of_the_float32_weights(open_checkpoint, text, tmp_path):
    source, run, whole = open_checkpoint("qwen3"), tmp_path / "run", tmp_path / "whole"
    settings = ["checkpoint.every=1 step", "training.tokens=14 steps"]
    code = f"import cairn; cairn.continue_({str(source)!r}, {str(run)!r}, {{'foxes': {str(text)!r}}}, overrides={settings!r}, rate=3e-3)"
    assert kill_when(python(code), lambda: len(list((run / "checkpoints").glob("step-*/manifest.json"))) >= 2)
    resumed = cairn.resume(run)
    assert resumed.newest().digest == cairn.continue_(source, whole, {"foxes": text}, overrides=settings, rate=3e-3).newest().digest


def test_weights_that_were_changed_behind_the_optimizer_are_not_gone_on_with(open_checkpoint, text, tmp_path):
    run = cairn.continue_(open_checkpoint("qwen3"), tmp_path / "run", {"foxes": text}, tokens="2 steps")
    newest = run.newest()

    class Trainer:
        class trained:
            @staticmethod
            def parameters():
                return {name: torch.nn.Parameter(tensor.load().float() * 1.5) for name, tensor in newest.tensors.items()}

    with pytest.raises(ResumeError, match="changed behind the run"):
        state._restore_masters(Trainer, newest)


def test_what_is_asked_otherwise_is_listed_and_masters_follow(open_checkpoint, text, tmp_path):
    source = open_checkpoint("qwen3")
    run = cairn.continue_(source, tmp_path / "run", {"foxes": text}, tokens="2 steps", overrides=["checkpoint.dtype=float32"])
    assert "checkpoint.dtype: bfloat16 -> float32" in cairn.open(run.checkpoints()[0]).lineage.changed
    assert {tensor.dtype for tensor in run.newest().tensors.values()} == {torch.float32}
    assert not any(name.endswith("/master") for name in run.newest().optimizer)
    with pytest.raises(InputError, match="has a tokenizer of its own"):
        cairn.continue_(source, tmp_path / "other", {"foxes": text}, overrides=["data.tokenizer=byte"])


def test_a_starting_recipe_is_one_and_says_what_it_means(open_checkpoint, text, tmp_path):
    from cairn.training import recipe as recipes
    from cairn.training.run import recipe_to_fork

    source = open_checkpoint("gpt_neox")
    path = init(source, tmp_path / "ckpt.yaml", {"foxes": str(text)})
    assert recipe_to_fork(source, recipe=path).checkpoint.dtype == "bfloat16"
    small = init(text, tmp_path / "small.yaml")
    assert recipes.load(small).model.model_type == "llama"
    run = cairn.train(small, tmp_path / "run", ["training.tokens=2 steps", "data.tokenizer=byte"])
    assert math.isfinite(run.metrics()[-1]["loss"])
    for bad, sentence in ((small, "is not overwritten"), (tmp_path / "none" / "x.yaml", "no directory")):
        with pytest.raises(Exception, match=sentence):
            init(text, bad)
    with pytest.raises(Exception, match="neither a checkpoint nor a text"):
        init(tmp_path / "nothing.txt", tmp_path / "new.yaml")
    assert not (tmp_path / "new.yaml").exists()


def test_short_texts_get_short_rows_and_tiny_ones_are_refused(open_checkpoint, text, tmp_path):
    source = cairn.open(open_checkpoint("qwen3"))
    values = to_continue(source, {"foxes": text})
    assert values["data"]["sequence_length"] == 64 and values["training"]["tokens"] >= 15 * values["training"]["batch"]
    (tmp_path / "tiny.txt").write_text("A fox.")
    with pytest.raises(InputError, match="too few to train on"):
        to_continue(source, {"tiny": tmp_path / "tiny.txt"})
