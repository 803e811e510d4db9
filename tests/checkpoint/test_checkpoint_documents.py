"""Small files: limits of size, depth and kind, links, pipes and devices, and keeping whole."""

from __future__ import annotations

import json
import os
import threading
import time

import pytest

from cairn.checkpoint.format import documents, kinds
from cairn.errors import CairnError, DamagedError, Notice

DEEP = b'{"a":' * 100_000
HOSTILE = {
    "nested and cut": DEEP,
    "nested": b"[" * 100_000 + b"]" * 100_000,
    "nested below the interpreter's limit": b"[" * 500 + b"]" * 500,
    "half a character": b'{"a": "\\ud800"}',
    "a huge number": b'{"a": ' + b"9" * 5000 + b"}",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "cut": b'{"a": 1',
    "empty": b"",
    "zero bytes": bytes(64),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_whatever_is_no_sound_json_is_one_sentence(data, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"config\.json") as caught:
        documents.read_json(path)
    assert "\n" not in str(caught.value)


def test_what_people_write_is_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes('\ufeff{"a": [1, {"b": "caf\u00e9 \\ud83d\\ude00"}]}'.encode())
    assert documents.read_json(path) == {"a": [1, {"b": "caf\u00e9 \U0001f600"}]}


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink("/etc/hostname", path)])
def test_only_regular_files_of_the_directory_are_read_and_nothing_waits(make, tmp_path):
    path = tmp_path / "config.json"
    make(path)
    caught: list[object] = []

    def read() -> None:
        with pytest.raises(CairnError) as error:
            documents.read_json(path)
        caught.append(error.value)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(10)
    assert caught and str(path) in str(caught[0])


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DamagedError, match="larger than 64 MiB"):
        documents.read_bytes(path)


def test_links_stay_inside_or_in_one_hub_cache(tmp_path):
    hub = tmp_path / "models--someone--model"
    snapshot = hub / "snapshots" / "abc"
    for folder in (snapshot, hub / "blobs", tmp_path / "models--other" / "blobs"):
        folder.mkdir(parents=True)
    (hub / "blobs" / "123").write_text('{"a": 1}')
    (tmp_path / "models--other" / "blobs" / "9").write_text('{"secret": 1}')
    (snapshot / "config.json").symlink_to("../../blobs/123")
    (snapshot / "same.json").symlink_to("config.json")
    assert documents.read_json(snapshot / "config.json") == documents.read_json(snapshot / "same.json") == {"a": 1}
    (snapshot / "out.json").symlink_to(tmp_path / "models--other" / "blobs" / "9")
    (hub / "blobs" / "out").symlink_to(tmp_path / "models--other" / "blobs" / "9")
    (snapshot / "through.json").symlink_to("../../blobs/out")
    (snapshot / "loop.json").symlink_to("loop.json")
    for name in ("out.json", "through.json"):
        with pytest.raises(DamagedError, match="leaves its directory"):
            documents.read_json(snapshot / name)
    with pytest.raises((DamagedError, OSError)):
        documents.read_json(snapshot / "loop.json")
    assert documents.read_json(snapshot / "out.json", named=True) == {"secret": 1}


@pytest.mark.parametrize(
    ("kind", "document", "key"),
    [
        (kinds.Config, {"model_type": 5}, "model_type"),
        (kinds.Config, {"num_hidden_layers": "2"}, "num_hidden_layers"),
        (kinds.Config, {"hidden_size": 4e18}, "hidden_size"),
        (kinds.Config, {"vocab_size": 2**60}, "vocab_size"),
        (kinds.Config, {"rope_scaling": [1]}, "rope_scaling"),
        (kinds.Trainer, {"tokens": 1}, "step"),
        (kinds.Trainer, {"step": True}, "step"),
        (kinds.Trainer, {"step": 1, "feed": {"mixture": 3}}, "feed.mixture"),
        (kinds.Trainer, {"step": 1, "feed": {"mixture": [[0, {"a": -1}]]}}, "feed.mixture"),
        (kinds.Index, {"weight_map": [1]}, "weight_map"),
        (kinds.Index, {}, "weight_map"),
    ],
)
def test_a_key_of_another_kind_is_named(kind, document, key):
    with pytest.raises(DamagedError, match=f"'{key}"):
        documents.validated(kind, document, "file.json")


def test_rows_that_are_none_are_passed_over_and_said_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2\n[1]\n' + DEEP + b'\n\xff\n{"step": 3, "text": "a\xe2\x80\xa8b"}\n{"step": 4')
    with pytest.warns(Notice, match="4 lines passed over") as said:
        rows = list(documents.read_rows(path))
    assert [row["step"] for row in rows] == [1, 3] and rows[1]["text"] == "a\u2028b" and len(said) == 1


def test_a_file_that_is_kept_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.json"
    documents.keep_json(path, {"a": "caf\u00e9"})
    assert json.loads(path.read_bytes()) == {"a": "caf\u00e9"}

    def fails(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        documents.keep_json(path, {"a": "other"})
    assert json.loads(path.read_bytes()) == {"a": "caf\u00e9"} and os.listdir(path.parent) == ["file.json"]


def test_a_line_without_an_end_is_refused_at_once(tmp_path):
    """A file of 64 GiB of zeros takes no room on a disk and minutes to read."""
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.write(b'{"step": 1}\n')
        file.truncate(2**36)
    began = time.monotonic()
    with pytest.raises(DamagedError, match="line of more than 16 MiB"):
        list(documents.read_rows(path))
    assert time.monotonic() - began < 2
    path.write_bytes(b'{"step": 1}\n{"ste')
    assert list(documents.read_rows(path)) == [{"step": 1}]
