"""An open checkpoint of each family is continued, averaged with what it came from, and opens in transformers again."""

from __future__ import annotations

import pytest
import torch

import cairn

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
SOURCES = {
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**GROUPED, sliding_window=8, bos_token_id=0, eos_token_id=0),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "foxes.txt"
    path.write_text("\n\n".join(f"Once upon a time there was fox number {i}, who liked {i * 7 % 13} hens." for i in range(200)))
    return path


@pytest.mark.parametrize("family", sorted(SOURCES))
def test_an_open_checkpoint_is_continued_and_handed_on(family, text, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    config = SOURCES[family]()
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "open")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text.read_text()], trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"]))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(tmp_path / "open")

    recipe = {
        "model": {"name": family},
        "data": {"sources": {"foxes": {"corpus": str(text)}}, "sequence_length": 32},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "training": {"tokens": "4 steps", "batch": 128},
    }
    run = cairn.fork(tmp_path / "open", tmp_path / "run", recipe=recipe, fresh=["optimizer"])
    losses = [row["loss"] for row in run.metrics()]
    assert losses[-1] < losses[0]

    average = cairn.merge("average", [tmp_path / "open", run.newest().path], tmp_path / "average")
    theirs, ids = transformers.AutoModelForCausalLM.from_pretrained(average.path), torch.arange(20)[None]
    assert type(theirs.config) is type(config)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, average.model()(ids).logits, rtol=1e-5, atol=1e-5)
