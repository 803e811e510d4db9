"""Checkpoints of a hub: its cache is read through its links and never written into; names are resolved, or refused in one sentence."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import cairn
from cairn.checkpoint.format import hub, read
from cairn.checkpoint.format.place import place
from cairn.errors import CairnError, InputError, NotFoundError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(small_run, tmp_path) -> Path:
    """A repository as the hub's library keeps it: files in `blobs`, links in `snapshots`, a branch in `refs`; nobody may write there."""
    plain = cairn.export(small_run.newest(), tmp_path / "plain").path
    home = tmp_path / "hub" / "models--ann--pebble"
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "snapshots" / COMMIT).mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    for path in plain.iterdir():
        if path.name not in ("manifest.json", "lineage.json"):
            path.rename(home / "blobs" / f"blob-{path.name}")
            (home / "snapshots" / COMMIT / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    return home


def listing(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*"))


def test_the_cache_is_read_through_its_links_and_stays_as_it_is(cache: Path, small_run, corpus_file, tmp_path: Path) -> None:
    before, snapshot = listing(cache), cache / "snapshots" / COMMIT
    assert read.open(snapshot).model_digest == read.open(cache).model_digest == small_run.newest().model_digest
    task = {"name": "held-out", "corpus": str(corpus_file), "sequences": 2, "sequence_length": 16}
    assert cairn.evaluate(snapshot, [task]) and cairn.generate(cache, "the", new_tokens=2, temperature=0) is not None
    merged = cairn.merge("linear", [snapshot, small_run.newest()], tmp_path / "merged")
    assert all((merged.tensors[name].load() == tensor.load()).all() for name, tensor in small_run.newest().tensors.items())
    assert listing(cache) == before


def test_several_snapshots_and_links_that_leave(cache: Path) -> None:
    (cache / "snapshots" / "other").mkdir()
    assert read.open(cache).path.name == COMMIT  # its branch says which
    (cache / "refs" / "main").unlink()
    with pytest.raises(InputError, match="holds 2 snapshots"):
        read.open(cache)
    config = cache / "snapshots" / COMMIT / "config.json"
    config.unlink()
    config.symlink_to("/etc/hostname")
    with pytest.raises(CairnError, match="leaves its directory"):
        _ = read.open(cache / "snapshots" / COMMIT).config


@pytest.fixture
def library(cache, monkeypatch):
    """The hub's library, offline, with this cache."""
    found = pytest.importorskip("huggingface_hub")
    real = found.snapshot_download
    monkeypatch.setattr(found, "snapshot_download", lambda *names, **more: real(*names, cache_dir=cache.parent, local_files_only=True, **more))
    hub.snapshot.cache_clear()
    yield found
    hub.snapshot.cache_clear()


def test_names_of_a_hub_are_found_in_its_cache(library, cache: Path) -> None:
    for name in ("hf:ann/pebble", "hf:ann/pebble@main", f"hf:ann/pebble@{COMMIT}"):
        assert place(name) == cache / "snapshots" / COMMIT
    assert read.open("hf:ann/pebble").tokenizer.encode("the") and cairn.generate("hf:ann/pebble", "the", new_tokens=2) is not None


def test_what_a_hub_does_not_give_is_one_sentence(library, cache: Path, monkeypatch, tmp_path: Path) -> None:
    for name, said in (
        ("hf:ann/boulder", "is not in the hub's cache, and the hub cannot be reached from here; fetch it where it can: hf download ann/boulder"),
        ("hf:ann/pebble@other", "is not in the hub's cache"),
        ("hf:", "write hf:ORGANISATION/NAME"),
        ("hf:a/b/c", "write hf:ORGANISATION/NAME"),
        ("hf:../../etc", "write hf:ORGANISATION/NAME"),
    ):
        with pytest.raises(InputError, match=said):
            read.open(name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="name of a hub, from which checkpoints are read"):
        cairn.export(cache, "hf:ann/new")
    assert not os.path.exists("hf:ann")
    from huggingface_hub.errors import RepositoryNotFoundError

    class Missing(RepositoryNotFoundError):
        def __init__(self) -> None: ...

    def missing(*names: str, **more: object) -> str:
        raise Missing

    monkeypatch.setattr(library, "snapshot_download", missing)
    with pytest.raises(NotFoundError, match="no repository ann/none"):
        read.open("hf:ann/none")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install"):
        read.open("hf:ann/unseen")
