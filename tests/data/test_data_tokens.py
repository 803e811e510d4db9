"""Tokenizers, corpora and token stores: round trips, exact counts, nothing half-done."""

import json
import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.data import corpora, datasets
from cairn.data.corpora import Document
from cairn.data.text import tokenizer, tokens
from cairn.errors import DamagedError, InputError, NotFoundError
from tests import faults

BYTE = tokenizer.byte_level()


@settings(max_examples=60)
@given(st.text(max_size=80))
def test_any_text_survives_and_bytes_are_counted(text):
    for each in (BYTE, BPE):
        ids = each.encode(text)
        assert each.decode(ids) == text
        assert each.token_bytes[ids].sum() == len(text.encode())


BPE = tokenizer.train_bpe(["the stone marks the trail and the trail marks the way " * 20] * 20, 300)


def test_a_bpe_has_the_size_that_was_asked_for_and_shortens():
    assert BPE.vocab_size <= 300 and BPE.eos_id is not None and BPE.token_bytes[BPE.eos_id] == 0
    assert len(BPE.encode("the trail marks the way")) < len(BYTE.encode("the trail marks the way"))
    assert tokenizer.train_bpe(["the stone marks the trail and the trail marks the way " * 20] * 20, 300).digest == BPE.digest
    with pytest.raises(InputError, match="at least 257"):
        tokenizer.train_bpe(["a"], 100)


@pytest.mark.parametrize("each", [BYTE, BPE], ids=["byte", "bpe"])
def test_transformers_opens_a_saved_tokenizer(tmp_path, each):
    from transformers import AutoTokenizer

    each.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the trail <|endoftext|>", "naïve 石 \n\n  x", ""):
        assert theirs(text, add_special_tokens=False).input_ids == each.encode(text)
    assert theirs.eos_token_id == each.eos_id
    assert tokenizer.Tokenizer.load(tmp_path).digest == each.digest


def test_a_missing_or_broken_tokenizer_is_one_sentence(tmp_path):
    with pytest.raises(NotFoundError, match=r"tokenizer.json is missing"):
        tokenizer.Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DamagedError):
        _ = tokenizer.Tokenizer.load(tmp_path).vocab_size
    with pytest.raises(InputError, match="bpe: 4096"):
        tokenizer.resolve_tokenizer({"bp": 3})


def documents(count: int) -> list[str]:
    return [f"document {i}: " + "word " * (i % 17) for i in range(count)]


def corpus(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.mark.parametrize(("size", "code"), [(256, "<u2"), (65536, "<u2"), (65537, "<u4"), (2**32, "<u4"), (2**32 + 1, "<u8")])
def test_ids_never_overflow(size, code):
    assert tokens.token_dtype(size).str == code and np.array(size - 1).astype(code) == size - 1


def test_ids_above_sixteen_bits_are_stored_as_they_are(tmp_path):
    class Wide(tokenizer.Tokenizer):
        vocab_size = 200_000

        def encode_batch(self, texts):
            return [[70_000 + len(text)] for text in texts]

    store = tokens.prepare(corpus(tmp_path / "c.jsonl", ["abc", "abcd"]), Wide(BYTE.definition), tmp_path / "s", held_out=0)
    assert sorted(store.train.tokens.tolist()) == sorted([BYTE.eos_id, 70_003, BYTE.eos_id, 70_004])


def test_a_store_holds_every_document_after_an_end_of_text(tmp_path):
    texts = documents(200)
    store = tokens.prepare(corpus(tmp_path / "c.jsonl", texts), BYTE, tmp_path / "s", held_out=0.2)
    found = {}
    for split in (store.train, store.held_out):
        ends = [*split.starts[1:].tolist(), len(split.tokens)]
        part = [BYTE.decode(split.tokens[int(a) + 1 : int(b)].tolist()) for a, b in zip(split.starts.tolist(), ends, strict=True)]
        assert (split.tokens[split.starts.astype(int)] == BYTE.eos_id).all()
        assert split.bytes == sum(len(text.encode()) for text in part)
        found |= dict.fromkeys(part, split is store.held_out)
    assert set(found) == set(texts)
    assert found == {text: tokens.is_held_out(text, 0.2) for text in texts}
    assert 15 < sum(found.values()) < 70


def test_a_document_stays_on_its_side_when_others_come(tmp_path):
    few = tokens.prepare(corpus(tmp_path / "a.jsonl", documents(50)), BYTE, tmp_path / "few", held_out=0.3)
    many = tokens.prepare(corpus(tmp_path / "b.jsonl", documents(90)), BYTE, tmp_path / "many", held_out=0.3)
    n = len(few.held_out.tokens)
    assert (many.held_out.tokens[:n] == few.held_out.tokens).all() and few.digest != many.digest


def test_a_kill_while_preparing_leaves_no_store(tmp_path):
    path = corpus(tmp_path / "big.jsonl", ["long text " * 2000] * 3000)
    code = "import sys; from cairn.data.text import tokens, tokenizer; tokens.prepare(sys.argv[1], tokenizer.byte_level(), sys.argv[2])"
    process = faults.python(code, path, str(tmp_path / "store"))
    assert faults.kill_when(process, lambda: any(p.stat().st_size > 1000 for p in tmp_path.glob(".store-*/train.bin")))
    with pytest.raises(NotFoundError):
        tokens.open_store(tmp_path / "store")


def test_a_store_is_not_overwritten_and_a_cut_file_is_damage(tmp_path):
    path = corpus(tmp_path / "c.jsonl", documents(30))
    store = tokens.prepare(path, BYTE, tmp_path / "s")
    with pytest.raises(InputError, match="never overwritten"):
        tokens.prepare(path, BYTE, tmp_path / "s")
    os.truncate(store.path / "train.bin", 10)
    with pytest.raises(DamagedError, match=r"train.bin"):
        _ = tokens.open_store(store.path).train


def test_the_cache_prepares_once_and_again_when_the_files_change(tmp_path):
    path = corpus(tmp_path / "c.jsonl", documents(30))
    first = tokens.prepare_cached(path, BYTE)
    assert tokens.prepare_cached(path, BYTE).path == first.path
    corpus(tmp_path / "c.jsonl", documents(31))
    assert tokens.prepare_cached(path, BYTE).path != first.path
    assert tokens.prepare_cached({"store": str(first.path)}, BYTE).digest == first.digest
    with pytest.raises(InputError, match="another tokenizer"):
        tokens.prepare_cached({"store": str(first.path)}, BPE)


def test_text_jsonl_and_parquet_hold_the_same_documents(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    texts = documents(20)
    (tmp_path / "c.txt").write_text("\n\n\n".join(texts))
    parquet.write_table(pa.table({"text": texts}), tmp_path / "c.parquet")
    corpus(tmp_path / "c.jsonl", texts)
    for spec in ({"name": "text", "paths": str(tmp_path / "c.txt"), "separator": "\n\n\n"}, tmp_path / "c.parquet", tmp_path / "c.jsonl"):
        assert [document.text for document in corpora.resolve(spec).documents()] == texts
        assert len({document.id for document in corpora.resolve(spec).documents()}) == len(texts)


def test_a_saved_hugging_face_data_set_is_a_corpus(tmp_path):
    import datasets as hf

    hf.Dataset.from_dict({"body": ["one", "two"]}).save_to_disk(tmp_path / "d")
    found = corpora.resolve({"name": "hf", "path": str(tmp_path / "d"), "field": "body"})
    assert [document.text for document in found.documents()] == ["one", "two"]
    with pytest.raises(InputError, match="no field 'text'"):
        list(corpora.resolve({"name": "hf", "path": str(tmp_path / "d")}).documents())
    hf.Dataset.from_dict({"text": ["three"]}).to_parquet(tmp_path / "e" / "train.parquet")
    assert [d.text for d in corpora.resolve({"name": "hf", "path": str(tmp_path / "e")}).documents()] == ["three"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("{", "line 1 is not valid JSON"), ('{"body": "x"}', "no text in 'text' (it has body)"), ("[1]", "is not a JSON object")],
)
def test_a_bad_line_is_named(tmp_path, content, sentence):
    (tmp_path / "c.jsonl").write_text(content + "\n")
    with pytest.raises(DamagedError) as caught:
        list(corpora.resolve(str(tmp_path / "c.jsonl")).documents())
    assert sentence in str(caught.value)


def test_what_is_no_corpus_names_the_nearest(tmp_path):
    with pytest.raises(NotFoundError, match="Did you mean 'python-docs'"):
        corpora.resolve("python-dogs")
    with pytest.raises(NotFoundError, match="No file is found"):
        list(corpora.resolve(str(tmp_path / "none.txt")).documents())
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(DamagedError, match="not UTF-8"):
        list(corpora.resolve(str(tmp_path / "latin.txt")).documents())


@pytest.mark.parametrize("name", ["python-docs", "python-source"])
def test_this_installation_is_a_corpus(name):
    limited = corpora.resolve({"name": name, "max_bytes": "1 MiB"})
    first = list(limited.documents())
    size = sum(len(document.text.encode()) for document in first)
    assert 2**20 <= size < 4 * 2**20 and first == list(limited.documents())
    assert len({document.text for document in first}) == len(first) and all(isinstance(d, Document) for d in first)
    assert limited.describe()["license"]


def test_named_sets_are_whole_and_have_rows(real_data):
    for name in ("blimp", "gsm8k", "ud-en-ewt", "world-cities", "tiny-shakespeare"):
        assert datasets.check(name) == []
        assert next(iter(datasets.rows(name)))
    good = next(iter(datasets.rows("blimp", "passive_1.jsonl")))
    assert {"sentence_good", "sentence_bad"} <= set(good)
    sentence = next(iter(datasets.rows("ud-en-ewt", "en_ewt-ud-dev.conllu")))
    assert sentence["text"].startswith(sentence["words"][0][1])
    plays = list(corpora.resolve("tiny-shakespeare").documents())
    assert len(plays) > 500 and math.isclose(sum(len(d.text) for d in plays), 1_115_394, rel_tol=0.01)


def test_arrays_of_a_set_have_the_shape_that_their_head_announces(real_data, tmp_path):
    images, labels = (datasets.array("mnist-10k", f"t10k-{each}-ubyte.gz") for each in ("images-idx3", "labels-idx1"))
    assert images.shape == (10_000, 28, 28) and images.dtype == np.uint8 and images.max() == 255
    assert np.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009] and labels[:3].tolist() == [7, 2, 1]
    head = bytes([0, 0, 0x0C, 2]) + (2).to_bytes(4, "big") + (1).to_bytes(4, "big")
    assert datasets._idx(head + (-5).to_bytes(4, "big", signed=True) + (70_000).to_bytes(4, "big"), tmp_path).tolist() == [[-5], [70_000]]
    for data, sentence in ((head + bytes(4), "announces 2 x 1 items and has 1"), (head[:9], "not an IDX file"), (b"PNG..", "not an IDX file")):
        with pytest.raises(DamagedError, match=sentence):
            datasets._idx(data, tmp_path / "x")
    with pytest.raises(NotFoundError, match="has no file 't10k'"):
        datasets.array("mnist-10k", "t10k")


def test_sets_that_are_not_here_say_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.delenv("CAIRN_DATA", raising=False)
    with pytest.raises(NotFoundError, match="cairn data fetch blimp"):
        datasets.find("blimp")
    with pytest.raises(InputError, match="tests only"):
        datasets.fetch("counterfact")
    with pytest.raises(NotFoundError, match="Did you mean 'blimp'"):
        datasets.find("blmp")


def test_what_arrives_from_an_origin_is_checked(monkeypatch, tmp_path, real_data):
    """A server on this machine stands in for the origin: the right bytes are kept, others are not."""
    import functools
    import http.server
    import threading

    site = tmp_path / "site" / "data" / "tinyshakespeare"
    site.mkdir(parents=True)
    (site / "input.txt").write_bytes((real_data / "tiny-shakespeare" / "input.txt").read_bytes())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "site")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("CAIRN_DATA")
    monkeypatch.setenv("CAIRN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.NamedDataset, "url", lambda self, file: f"http://127.0.0.1:{server.server_port}/{self.folder}/{file}")
    try:
        assert (datasets.fetch("tiny-shakespeare") / "input.txt").stat().st_size == 1_115_394
        assert datasets.check("tiny-shakespeare") == []
        monkeypatch.setenv("CAIRN_CACHE", str(tmp_path / "other"))
        (site / "input.txt").write_text("something else")
        with pytest.raises(DamagedError, match="not the file that was published"):
            datasets.fetch("tiny-shakespeare")
        assert datasets.locate("tiny-shakespeare") is None
    finally:
        server.shutdown()
