"""A tokenizer does what its own files say: whatever kind it is, whoever wrote it, and whatever one call of another program wanted."""

import json
import re
import time

import pytest
from tokenizers import Tokenizer as Backend

from cairn.data.text import tokenizer
from cairn.data.text.tokenizer import Tokenizer
from cairn.errors import InputError
from tests import tokenizer_kinds as kinds

TEXTS = ["First Citizen", "First Citizen: hear me speak.\n\nThe lazy dog", "Привет, naïve 石 café", " the way", "a"]
KINDS = sorted(kinds.MAKERS)


@pytest.fixture(params=KINDS)
def opened(request, tmp_path):
    """A tokenizer of each kind, by us and by transformers."""
    from transformers import AutoTokenizer

    folder = kinds.write(request.param, tmp_path / "t")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder), request.param


# -- what one call wanted (truncation, padding) ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_truncation_and_padding_of_one_call_say_nothing_about_the_tokenizer(kind, tmp_path):
    document = json.loads(kinds.MAKERS[kind]())
    document["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = {"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    (kinds.write(kind, tmp_path / "cut") / "tokenizer.json").write_text(json.dumps(document))
    assert len(Backend.from_str(json.dumps(document)).encode("word " * 50).ids) == 16
    plain, other = Tokenizer.load(kinds.write(kind, tmp_path / "plain")), Tokenizer.load(tmp_path / "cut")
    text = "word " * 50
    assert other.encode(text) == plain.encode(text) == other.encode_batch([text, "a"])[0] and len(plain.encode(text)) > 40
    assert other.encode("a") == plain.encode("a") and other.digest == plain.digest
    other.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer.json").read_text())["truncation"] is None


# -- sameness of meaning --------------------------------------------------------------------------------------------


def test_the_digest_is_of_the_meaning_not_of_the_bytes(opened, tmp_path):
    ours, theirs, _ = opened
    theirs.save_pretrained(tmp_path / "again")
    document = json.loads(ours.definition)
    if "merges" in document["model"]:
        document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
    assert Tokenizer(json.dumps(document).encode()).digest == ours.digest
    document["model"]["vocab"] = document["model"]["vocab"][::-1] if isinstance(document["model"]["vocab"], list) else {"other": 0}
    assert Tokenizer(json.dumps(document).encode()).digest != ours.digest


# -- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_those_of_the_text(opened, text):
    ours, _, kind = opened
    ids = ours.encode(text)
    written = ours.decode(ids)
    if ours._unknown is not None and ours.backend.token_to_id(ours._unknown) in ids:
        return  # what an unknown sign was is not known
    begun = [next(number for token, number in ours.special_tokens.items() if token != ours._unknown), *ids]
    assert ours.bytes_of(begun).sum() == len(written.encode())
    if kind in ("metaspace", "byte_level"):  # the others have no signs for what they have not seen
        assert written == text
    middle = len(ids) // 2
    assert ours.bytes_of(begun[: middle + 1]).sum() + ours.bytes_of(begun[middle:]).sum() == len(written.encode())


def test_bytes_of_byte_fallback_on_russian():
    ours = Tokenizer(kinds.metaspace(), kinds.config("metaspace"))
    text = "Съешь же ещё этих мягких французских булок. " * 5
    assert ours.bytes_of([1, *ours.encode(text)]).sum() == len(text.encode())


def test_an_added_word_counts_its_own_bytes_and_a_special_token_none():
    ours = Tokenizer(kinds.byte_level(), kinds.config("byte_level"))
    assert ours.token_bytes[ours.backend.token_to_id("é!")] == 3
    assert ours.token_bytes[ours.backend.token_to_id("<|im_end|>")] == 0
    assert ours.bytes_of([0, *ours.encode("né!e")]).sum() == len("né!e".encode())


# -- what stands in front -------------------------------------------------------------------------------------------


def test_what_stands_in_front_is_what_transformers_puts_there(opened):
    ours, theirs, kind = opened
    for text in TEXTS:
        assert ours.encode_whole(text) == theirs(text).input_ids
        assert [*ours.front, *ours.encode(text)] == [i for i in theirs(text).input_ids if kind != "unigram" or i != 1]
    assert ours.front == ([1] if kind == "metaspace" else [])


@pytest.mark.parametrize("ours", [tokenizer.byte_level(), tokenizer.train_bpe(["the stone marks the trail " * 20], 280)], ids=["byte", "bpe"])
def test_our_tokenizers_begin_a_text_as_documents_begin_in_training(ours, tmp_path):
    from transformers import AutoTokenizer

    ours.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert ours.front == [ours.eos_id] == [ours.begin_id] and ours.prompt("") == ours.front
    assert AutoTokenizer.from_pretrained(tmp_path)("the trail").input_ids == ours.prompt("the trail")


# -- what ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "generation", "wanted"),
    [({}, None, {2}), ({"eos_token_id": 5}, None, {2, 5}), ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, {2, 5, 6, 7}), ({"eos_token_id": None}, {}, {2})],
)
def test_every_end_that_the_files_name_is_one(tmp_path, config, generation, wanted):
    folder = kinds.write("metaspace", tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    ours = Tokenizer.load(folder)
    assert ours.end_ids == wanted and ours.extended(["<new>"]).end_ids == wanted


# -- text as transformers writes it ---------------------------------------------------------------------------------


def test_a_continuation_is_what_transformers_adds_to_the_prompt(opened):
    ours, theirs, _ = opened
    for text in TEXTS:
        ids = ours.encode_whole(text)
        for cut in range(1, len(ids)):
            before, after = theirs.decode(ids[:cut], skip_special_tokens=True), theirs.decode(ids, skip_special_tokens=True)
            if after.startswith(before):
                assert before + ours.continuation(ids[:cut], ids[cut:]) == after


def test_the_space_before_a_continuation_is_kept():
    ours = Tokenizer(kinds.metaspace(), kinds.config("metaspace"))
    prompt, rest = ours.prompt("First"), ours.encode("Citizen")
    assert ours.decode(rest) == "Citizen" and ours.continuation(prompt, rest) == " Citizen"


# -- training -------------------------------------------------------------------------------------------------------


def test_training_on_an_unbroken_word_takes_time_in_proportion():
    """Four times the word, about four times the time; it was sixteen."""
    import random

    letters = random.Random(0)
    word = "".join(letters.choice("abcdefgh") for _ in range(160_000))
    begin = time.perf_counter()
    tokenizer.train_bpe([word[:40_000]], 400)
    short = time.perf_counter() - begin
    begin = time.perf_counter()
    whole = tokenizer.train_bpe([word], 400)
    assert time.perf_counter() - begin < 9 * short + 0.5
    assert whole.vocab_size == 400 and whole.decode(whole.encode(word)) == word


def test_ordinary_text_is_trained_on_whole():
    text = "the stone marks the trail\n" * 200
    assert list(tokenizer._bounded(text)) == [text] and "".join(tokenizer._bounded("x" * 5000 + " y")) == "x" * 5000 + " y"
    assert max(map(len, re.findall(r"\S+", "\0".join(tokenizer._bounded("x" * 5000)).replace("\0", " ")))) == tokenizer.LONGEST_WORD


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pattern that llama.cpp knows as pre-tokenizer "gpt-2" (and its converter writes as `tokenizer.ggml.pre`)."""


@pytest.mark.parametrize("ours", [tokenizer.byte_level(), tokenizer.train_bpe(["the stone marks the trail " * 20], 280)], ids=["byte", "bpe"])
def test_our_tokenizers_split_words_by_the_rule_that_converters_call_gpt_2(ours):
    from tokenizers import Regex, pre_tokenizers

    known = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(GPT2), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    text = "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n🚀 (normal) 😶‍🌫️ ✅ 🦙🦙 3 33 333 3333 ------======= нещо ''''''```````\"\"\"\"......!!!!!!??????"
    text += " I've been 'told he's there, 'RE you sure? 'M not sure"
    assert ours.backend.pre_tokenizer.pre_tokenize_str(text) == known.pre_tokenize_str(text)
    written = json.loads(ours.definition)["pre_tokenizer"]
    assert written == {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def test_text_that_is_none_is_refused_in_one_sentence():
    for bad in ("\ud800", "a\udce9b"):
        with pytest.raises(InputError, match="surrogate"):
            tokenizer.byte_level().encode(bad)
        with pytest.raises(InputError, match="surrogate"):
            tokenizer.byte_level().encode_batch(["good", bad])
