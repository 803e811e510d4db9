"""Tokenizer surgery: old rows bit for bit, new rows by the stated rule, tied heads tied, text made of the same tokens, and models that merge afterwards."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cairn
from cairn.checkpoint.format import read, verify
from cairn.data.text import vocabularies
from cairn.data.text.tokenizer import Tokenizer, train_bpe
from cairn.errors import CairnError, InputError, MismatchError
from tests import tokenizer_kinds as kinds

WORDS = re.split(" ", "the stone on a trail marks the way that was walked before and can be walked again after rain")
OTHER = re.split(" ", "der Stein am Weg zeigt den Pfad, den man vor dem Regen ging: 2026 naïve Wörter")


def _texts(words: list[str], count: int, seed: int) -> list[str]:
    chooser = random.Random(seed)
    return [" ".join(chooser.choices(words, k=12)) for _ in range(count)]


ENGLISH, GERMAN = train_bpe(_texts(WORDS, 60, 0), 330), train_bpe(_texts(OTHER, 60, 1), 340)


def model(folder: Path, tokenizer: Tokenizer | str, *, tied: bool = True, rows: int = 0, family: str = "llama", dtype: str = "float32", seed: int = 0) -> Path:
    """A transformers directory of a small random model with a tokenizer."""
    transformers = pytest.importorskip("transformers")
    if isinstance(tokenizer, str):
        kinds.write(tokenizer, folder)
    else:
        tokenizer.save(folder)
    size = max(Tokenizer.load(folder).vocab_size, rows)
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": size, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256}
    sizes |= {"intermediate_size": 32, "num_key_value_heads": 1} if family != "gpt2" else {}
    config = transformers.AutoConfig.for_model(family, **sizes, tie_word_embeddings=tied, initializer_range=0.2, bos_token_id=None, eos_token_id=3)
    transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


def rows_of(checkpoint: Any, name: str = "model.embed_tokens.weight") -> torch.Tensor:
    return checkpoint.tensors[name].load()


@pytest.mark.parametrize(("tied", "rows", "dtype"), [(True, 0, "float32"), (False, 0, "bfloat16"), (True, 350, "bfloat16")])
def test_extending_keeps_every_row_and_makes_the_rest_of_pieces(tied: bool, rows: int, dtype: str, tmp_path: Path) -> None:
    source = read.open(model(tmp_path / "m", ENGLISH, tied=tied, rows=rows, dtype=dtype))
    made = cairn.tokenizer.extend(source, ["stonewall", "the", " walked again"], tmp_path / "out", multiple=8)
    result, old = made.checkpoint, ENGLISH.vocab_size
    assert made.tokens == (old, old + 2 + (ENGLISH.backend.token_to_id("the") is None)) and verify.verify(result.path).sound
    names = ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]
    assert set(result.tensors) == set(source.tensors) and result.config["tie_word_embeddings"] == tied
    for name in names:
        before, after = rows_of(source, name), rows_of(result, name)
        assert after.dtype == before.dtype and after.shape[0] % 8 == 0 and after.shape[0] == result.config["vocab_size"] >= len(before)
        assert torch.equal(after[:old], before[:old])
        pieces = ENGLISH.encode("stonewall")
        number = result.tokenizer.backend.token_to_id("stonewall")
        assert torch.equal(after[number], before[pieces].double().mean(0).to(before.dtype)) and len(pieces) > 1
    assert all(torch.equal(t.load(), source.tensors[n].load()) for n, t in result.tensors.items() if n not in names)
    assert (
        result.tokenizer.encode("a stonewall on")[-3:] != ENGLISH.encode("a stonewall on")[-3:]
        and result.tokenizer.decode(result.tokenizer.encode("a stonewall on")) == "a stonewall on"
    )
    assert result.read_file("chat_template.jinja") and result.lineage.name == "tokenizer extend" and result.lineage.parents[0].digest == source.digest
    assert result.model()(torch.tensor([[3, number]])).logits.shape[-1] == result.config["vocab_size"]


def test_special_tokens_stand_for_themselves_and_begin_as_the_mean(tmp_path: Path) -> None:
    source = read.open(model(tmp_path / "m", ENGLISH))
    result = cairn.tokenizer.extend(source, ["<think>", "</think>"], tmp_path / "out", special=True).checkpoint
    numbers = [result.tokenizer.special_tokens[token] for token in ("<think>", "</think>")]
    assert result.tokenizer.encode("<think>the</think>")[0] == numbers[0]
    expected = rows_of(source).double().mean(0).float()
    assert all(torch.equal(rows_of(result)[number], expected) for number in numbers)
    with pytest.raises(InputError, match="all of these tokens already"):
        cairn.tokenizer.extend(result, ["<think>"], tmp_path / "none")


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), kind=st.sampled_from(["byte_level", "metaspace", "bpe"]))
def test_text_of_a_trimmed_tokenizer_is_made_of_the_same_tokens(seed: int, kind: str) -> None:
    old = ENGLISH if kind == "bpe" else Tokenizer(kinds.MAKERS[kind](), kinds.config(kind))
    corpus = _texts(WORDS + kinds.LINES[1].split(), 3, seed)
    new, kept = vocabularies.trimmed(old, {number for text in corpus for number in old.encode(text)})
    assert len(kept) == new.vocab_size < old.vocab_size and kept == sorted(kept)
    for text in corpus:
        assert [kept[number] for number in new.encode(text)] == old.encode(text) and [kept[n] for n in new.encode_whole(text)] == old.encode_whole(text)
    for text in ("something wholly other: Ünïcödé 日本 77", "  \n"):
        assert new.decode(new.encode(text)) == old.decode(old.encode(text))
    assert set(new.special_tokens) == set(old.special_tokens)


def test_trimming_a_model_changes_nothing_that_its_corpus_shows(tmp_path: Path) -> None:
    source = read.open(model(tmp_path / "m", ENGLISH, tied=False))
    (tmp_path / "corpus.txt").write_text("the stone marks the way again\n")
    made = cairn.tokenizer.trim(source, str(tmp_path / "corpus.txt"), tmp_path / "out")
    result, text = made.checkpoint, "the stone marks the way"
    new, old = result.tokenizer.encode(text), source.tokenizer.encode(text)
    kept = [source.tokenizer.backend.token_to_id(result.tokenizer.backend.id_to_token(number)) for number in range(result.tokenizer.vocab_size)]
    assert [kept[number] for number in new] == old and made.made == 0 and made.kept == len(kept) < 330
    assert all(torch.equal(rows_of(result, name), rows_of(source, name)[kept]) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    with torch.no_grad():
        logits = source.model()(torch.tensor([old])).logits[..., kept]
        assert torch.allclose(result.model()(torch.tensor([new])).logits, logits, atol=1e-6)
    assert result.config["eos_token_id"] == kept.index(3) if 3 in kept else result.config["eos_token_id"] is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "stablelm"])
def test_transplanting_keeps_the_rows_of_the_same_text(family: str, tmp_path: Path) -> None:
    """Also of a family that only transformers builds, and over two ways of spelling."""
    source, donor = read.open(model(tmp_path / "m", ENGLISH, tied=False, family=family)), model(tmp_path / "d", "metaspace")
    made = cairn.tokenizer.transplant(source, donor, tmp_path / "out")
    result, theirs = made.checkpoint, Tokenizer.load(donor)
    name = "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    assert result.tokenizer.digest == theirs.digest and result.config["vocab_size"] == theirs.vocab_size == rows_of(result, name).shape[0]
    space_the, letter = theirs.backend.token_to_id("▁the"), theirs.backend.token_to_id("q")
    old_the, old_letter = ENGLISH.backend.token_to_id("Ġthe"), ENGLISH.backend.token_to_id("q")
    assert old_the is not None and torch.equal(rows_of(result, name)[space_the], rows_of(source, name)[old_the])
    assert torch.equal(rows_of(result, name)[letter], rows_of(source, name)[old_letter])
    assert torch.equal(rows_of(result, name)[theirs.backend.token_to_id("<0xC3>")], rows_of(source, name)[ENGLISH.backend.token_to_id("Ã")])
    fox = theirs.backend.token_to_id("▁fox")
    pieces = ENGLISH.encode(" fox")
    assert fox is not None and len(pieces) > 1 and torch.equal(rows_of(result, name)[fox], rows_of(source, name)[pieces].double().mean(0).float())
    assert result.config["eos_token_id"] is None or 0 <= result.config["eos_token_id"] < theirs.vocab_size
    assert result.model()(torch.tensor([[letter, fox]])) is not None


def test_models_of_two_vocabularies_merge_after_a_union(tmp_path: Path) -> None:
    first, second = model(tmp_path / "en", ENGLISH), model(tmp_path / "de", GERMAN, seed=1)
    with pytest.raises(MismatchError, match="cairn tokenizer union"):
        cairn.merge("linear", [first, second], tmp_path / "none")
    made = cairn.tokenizer.union([first, second], tmp_path / "alike", multiple=4)
    one, two = (surgery.checkpoint for surgery in made)
    assert [path.name for path in sorted((tmp_path / "alike").iterdir())] == ["1-en", "2-de"] and one.tokenizer.digest == two.tokenizer.digest
    assert torch.equal(rows_of(one)[: ENGLISH.vocab_size], rows_of(read.open(first)))
    for token in ("Ġden", "Ġthe", "e", "Ġder"):
        number, old = two.tokenizer.backend.token_to_id(token), GERMAN.backend.token_to_id(token)
        assert number is not None and (old is None or torch.equal(rows_of(two)[number], rows_of(read.open(second))[old])), token
    merged = cairn.merge("linear", [one, two], tmp_path / "merged")
    assert torch.allclose(rows_of(merged), (rows_of(one) + rows_of(two)) / 2) and not (tmp_path / "none").exists()
    for words in (WORDS, OTHER):
        text = " ".join(words)
        assert merged.tokenizer.decode(merged.tokenizer.encode(text)) == text
    assert merged.tokenizer.encode(" ".join(WORDS)) == ENGLISH.encode(" ".join(WORDS))


def test_same_sizes_and_other_tokens_get_the_same_advice(tmp_path: Path) -> None:
    other = train_bpe(_texts(OTHER, 60, 1), 330)
    with pytest.raises(MismatchError, match=r"different tokenizers.*cairn tokenizer union"):
        cairn.merge("linear", [model(tmp_path / "a", ENGLISH, rows=340), model(tmp_path / "b", other, rows=340)], tmp_path / "none")


def test_what_cannot_be_done_is_said_and_nothing_is_written(tmp_path: Path, small_run) -> None:
    folder = model(tmp_path / "m", ENGLISH)
    cases = [
        (lambda: cairn.tokenizer.extend(folder, [], tmp_path / "out"), "at least one token"),
        (lambda: cairn.tokenizer.extend(folder, [" "], tmp_path / "out"), "at least one sign"),
        (lambda: cairn.tokenizer.union([folder], tmp_path / "out"), "two checkpoints"),
        (lambda: cairn.tokenizer.union([folder, model(tmp_path / "p", "metaspace")], tmp_path / "out"), "transplant"),
        (lambda: cairn.tokenizer.trim(model(tmp_path / "w", "wordpiece"), "python-docs", tmp_path / "out"), "WordPiece"),
        (lambda: cairn.tokenizer.transplant(folder, tmp_path / "nothing", tmp_path / "out"), "no tokenizer at"),
    ]
    for call, said in cases:
        with pytest.raises(CairnError, match=said):
            call()
    assert not (tmp_path / "out").exists()


def test_loss_before_and_after_as_typed(cairn_words, small_run, corpus_file, tmp_path: Path) -> None:
    made = cairn_words("tokenizer", "extend", small_run.path, "stone", " trail", "-o", tmp_path / "more", "--text", corpus_file, "--json")
    before, after = made["bits_per_byte"]
    task = {"name": "held-out", "corpus": str(corpus_file), "sequences": 64, "sequence_length": 128}
    figures = [row.value for row in cairn.evaluate([small_run.newest(), tmp_path / "more"], [task], store=False) if row.metric == "bits_per_byte"]
    assert figures == [before, after] and before != after and made["tokens"] == [257, 259] and made["made"] == 2
    trimmed = cairn_words("tokenizer", "trim", tmp_path / "more", "--corpus", corpus_file, "-o", tmp_path / "less", "--text", corpus_file, "--json")
    assert trimmed["bits_per_byte"][0] == pytest.approx(after) and json.dumps(trimmed)


@pytest.fixture
def cairn_words(monkeypatch, capsys):
    """The command line in this process; its JSON document."""
    import sys

    from cairn.cli.main import main

    def call(*words: object) -> Any:
        monkeypatch.setattr(sys, "argv", ["cairn", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main()
        return json.loads(capsys.readouterr().out)

    return call
