"""Files of text: one rule for compression, encoding, newlines, JSON lines and hidden names."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as some

from cairn.data import corpora, files
from cairn.data.corpora.passages import cut, passages
from cairn.errors import CairnError, DamagedError, InputError

TEXT = "Ein Café\nzwei\n\ndrei"


def texts(path, **options):
    return [document.text for document in corpora.resolve({"name": "text", "paths": str(path), **options}).documents()]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_a_mark_is_dropped_and_every_newline_is_one(tmp_path, encoding, newline):
    (tmp_path / "a.txt").write_bytes(TEXT.replace("\n", newline).encode(encoding))
    assert texts(tmp_path / "a.txt") == [TEXT]
    assert texts(tmp_path / "a.txt", separator="\r\n\r\n") == ["Ein Café\nzwei", "drei"] == texts(tmp_path / "a.txt", separator="\n\n")


@given(some.text(some.sampled_from("ab\r\né\u2028"), max_size=60), some.integers(1, 7))
def test_parts_meet_anywhere_without_a_trace(text, size):
    with pytest.MonkeyPatch.context() as patch:
        import pathlib
        import tempfile

        patch.setattr(files, "_PART", size)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "a.txt"
            path.write_bytes(text.encode())
            assert "".join(files.parts(path)) == text.replace("\r\n", "\n").replace("\r", "\n")


def test_compressed_files_are_read_and_hidden_ones_passed_over(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    line = json.dumps({"text": "eins"}) + "\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    with pyarrow.output_stream(str(tmp_path / "b.jsonl.zst"), compression="zstd") as file:
        file.write(line.replace("eins", "zwei").encode())
    for hidden in (".ipynb_checkpoints", ".git/deep"):
        (tmp_path / hidden).mkdir(parents=True)
        (tmp_path / hidden / "c.txt").write_text("not this")
        (tmp_path / hidden / "c.jsonl").write_text(json.dumps({"text": "nor this"}))
    (tmp_path / ".d.jsonl").write_text(json.dumps({"text": "nor that"}))
    found = corpora.resolve(str(tmp_path))
    assert type(found).__name__ == "JsonLines" and [document.text for document in found.documents()] == ["eins", "zwei"]
    assert [document.text for document in corpora.resolve(str(tmp_path / ".d.jsonl")).documents()] == ["nor that"], "named, it is read"


@pytest.mark.parametrize("cut_to", [5, -3])
def test_a_compressed_file_that_is_cut_short_is_damage(tmp_path, cut_to):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:cut_to])
    with pytest.raises(DamagedError, match=r"a\.txt\.gz cannot be read to its end"):
        texts(tmp_path / "a.txt.gz")


def test_lines_of_json_end_at_a_line_feed_alone(tmp_path):
    rows = [{"text": "a\u2028b\x85c\u2029d"}, {"text": "e\rf"}, {"text": "😀"}]
    for head, end in ((b"", "\n"), (b"\xef\xbb\xbf", "\r\n")):
        (tmp_path / "a.jsonl").write_bytes(head + end.join(json.dumps(row, ensure_ascii=False).replace("\\r", "\\r") for row in rows).encode())
        assert [row for _, row in files.rows(tmp_path / "a.jsonl")] == rows
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert [row for _, row in files.rows(tmp_path / "a.jsonl")] == rows, "escaped, whole pairs of surrogates are characters"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "caf\xe9"}', "line 3 is not UTF-8"),
        (b'{"text": "\\ud83d"}', "line 3 holds half a character"),
        (b'{"\\uDE00": 1}', "line 3 holds half a character"),
        (b"[1]", "line 3 is not a JSON object but list"),
        (b"{", "line 3 is not valid JSON"),
        (b"[" * 100_000, "line 3 is not valid JSON"),
    ],
)
def test_what_is_wrong_is_one_sentence_with_the_line(tmp_path, line, said):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(DamagedError, match=said):
        list(corpora.resolve(str(tmp_path / "a.jsonl")).documents())


def test_text_of_another_encoding_is_named_by_its_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\ncaf\xe9\n")
    with pytest.raises(DamagedError, match="line 3 is not UTF-8"):
        texts(tmp_path / "a.txt")
    with pytest.raises(InputError, match="is not a file"):
        files.opened(tmp_path)


@given(some.text(some.sampled_from("ab \n"), max_size=300), some.integers(1, 40), some.integers(1, 50))
def test_passages_joined_are_the_text_and_none_is_too_long(text, longest, size):
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    found = list(passages(parts, longest))
    assert "".join(found) == text and all(0 < len(passage) <= longest for passage in found)
    assert all(len(passage) > longest // 2 for passage in found[:-1]), "no shorter than the rule allows"
    assert len(found) <= 1 or len(text) > longest


def test_a_passage_ends_at_a_blank_line_a_line_or_a_word():
    assert next(passages(["aaaa\nbb\n\ncc dd"], 10)) == "aaaa\nbb\n\n"
    assert next(passages(["aaaa bb\nccc dd"], 10)) == "aaaa bb\n" and next(passages(["aaaaa bbb ccc"], 10)) == "aaaaa bbb "
    assert next(passages(["a b" + "c" * 20], 10)) == "a b" + "c" * 7, "a break in the first half counts for nothing"


@given(some.lists(some.text("ab\n", max_size=30), max_size=12), some.integers(1, 20), some.integers(1, 9))
def test_a_separator_splits_the_same_wherever_parts_meet(documents, longest, size):
    whole = "\n--\n".join(documents)
    corpus = corpora.resolve({"name": "text", "paths": "nowhere", "separator": "\n--\n", "longest": longest})
    found = list(corpus._split(whole[i : i + size] for i in range(0, len(whole), size)))
    assert found == [passage for document in whole.split("\n--\n") for passage in passages([document], longest)]


def test_one_long_text_is_many_documents_read_in_little_memory(tmp_path):
    import tracemalloc

    (tmp_path / "book.txt").write_text("".join(f"Line {number} of a book without an end. " for number in range(150_000)))
    next(iter(corpora.resolve(str(tmp_path / "book.txt")).documents()))  # the modules that reading imports are no part of it
    tracemalloc.start()
    lengths = [len(document.text) for document in corpora.resolve(str(tmp_path / "book.txt")).documents()]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(lengths) > 5e6 and len(lengths) > 300 and max(lengths) <= 2**14 and peak < 2e6


def test_a_long_row_of_any_corpus_is_cut_before_it_is_encoded():
    documents = [corpora.Document("short", "a"), corpora.Document("x" * 25, "b", {"url": "u"})]
    found = list(cut(documents, 10))
    assert [each.text for each in found] == ["short", "x" * 10, "x" * 10, "x" * 5]
    assert [each.id for each in found] == ["a", "b#0", "b#1", "b#2"] and found[3].fields == {"url": "u"}


@pytest.mark.parametrize("kind", ["binary", "struct", "int"])
def test_a_column_that_is_no_text_is_refused_by_name(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    bad = {"binary": [b"caf\xc3\xa9"], "struct": [{"body": "x"}], "int": [3]}[kind]
    parquet.write_table(pyarrow.table({"text": bad, "body": ["good"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"'text' .* not text; columns of text: body"):
        list(corpora.resolve(str(tmp_path / "a.parquet")).documents())
    assert [d.text for d in corpora.resolve({"name": "parquet", "paths": str(tmp_path / "a.parquet"), "field": "body"}).documents()] == ["good"]
    pytest.importorskip("datasets")
    import datasets

    datasets.Dataset.from_dict({"text": bad, "body": ["good"]}).save_to_disk(tmp_path / "hf")
    with pytest.raises(InputError, match=r"'text' .* not text; set field=NAME"):
        list(corpora.resolve({"name": "hf", "path": str(tmp_path / "hf")}).documents())


def test_a_dictionary_of_texts_is_text(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    column = pyarrow.array(["one", "two", "one"]).dictionary_encode()
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert [document.text for document in corpora.resolve(str(tmp_path / "a.parquet")).documents()] == ["one", "two", "one"]


def test_every_error_is_ours(tmp_path):
    for name, data in (("a.jsonl", b"\xff\xfe"), ("b.txt", b"\xff"), ("c.jsonl.gz", b"plain"), ("d.jsonl.zst", b"plain"), ("e.parquet", b"PAR1")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CairnError):
            list(corpora.resolve(str(tmp_path / name)).documents())
