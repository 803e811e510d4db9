"""Checkpoints behind URLs: the same digest and the same reader as on a disk, visible only when whole, with damage named."""

import json
import math
import subprocess
import sys
import uuid

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cairn
from cairn.checkpoint.foreign.export import copy
from cairn.checkpoint.format import fragments, read, verify
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.manifest import MANIFEST
from cairn.checkpoint.format.parts import Part, boxes, common, within
from cairn.checkpoint.format.place import file_system, follow, key, place, sizes, way
from cairn.checkpoint.saving import write
from cairn.errors import CairnError, DamagedError, InputError, NotFoundError, ResumeError
from cairn.training.run import Run, fork, resume, train
from tests.checkpoint.test_checkpoint_parts import part_for, played, state, written

pytest.importorskip("upath")
ORIGIN = Lineage(kind="run", name="train")


def save(where, tensors=None, **more):
    return write.save(where, model=tensors or state(), config={"model_type": "x"}, lineage=ORIGIN, **more)


@pytest.fixture
def memory():
    """A new place in the memory of this process."""
    return f"memory://{uuid.uuid4().hex}/c"


@given(st.lists(st.integers(1, 4), max_size=4).map(tuple), st.data())
def test_any_range_of_items_is_a_few_boxes_in_order(whole, data):
    count = math.prod(whole)
    begin = data.draw(st.integers(0, count))
    end = data.draw(st.integers(begin, count))
    found = list(boxes("w", whole, begin, end))
    numbers = np.arange(count).reshape(whole)
    assert [i for part in found for i in numbers[part.slices].ravel()] == list(range(begin, end))
    assert len(found) <= max(1, 2 * len(whole) - 1)


@given(st.data())
def test_the_common_box_holds_the_common_items(data):
    whole = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3)))

    def part():
        begins = [data.draw(st.integers(0, size)) for size in whole]
        return Part("w", tuple(begins), tuple(data.draw(st.integers(0, size - begin)) for size, begin in zip(whole, begins, strict=True)))

    a, b = part(), part()
    numbers = np.arange(math.prod(whole)).reshape(whole)
    shared = common(a, b)
    assert set(numbers[shared.slices].ravel()) == set(numbers[a.slices].ravel()) & set(numbers[b.slices].ravel())
    if shared.count:
        assert np.array_equal(numbers[a.slices][within(shared, a).slices], numbers[shared.slices])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_digest_is_that_of_the_files_on_a_disk_however_many_write(size, memory, tmp_path, monkeypatch):
    monkeypatch.setattr(fragments, "FRAGMENT_BYTES", 2**20)  # parts are larger than a fragment
    alone = save(tmp_path / "alone")
    results = played(size, lambda peers: written(memory, peers))
    assert all(isinstance(result, read.Checkpoint) for result in results), results
    opened = cairn.open(memory)
    assert opened.digest == alone.digest and opened.model_digest == alone.model_digest and verify.verify(memory).sound
    assert not any(name.endswith(".safetensors") for name in sizes(opened.path))
    for name, tensor in state().items():
        assert torch.equal(opened.tensors[name].load(), tensor) and torch.equal(opened.tensors[name].view(), tensor)
        for rank in range(4):
            part = part_for(name, tensor, rank, 4)
            assert torch.equal(opened.tensors[name].read_part(part), tensor[part.slices])
        flat = tensor.reshape(-1)
        assert torch.equal(opened.tensors[name].flat(3, 1000), flat[3:1000])
    back = copy(opened, tmp_path / "back")
    assert back.digest == alone.digest
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (tmp_path / "alone" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("index", [3, -1, slice(2, 5), (slice(None), 2), (1, slice(1, 3), -1), (slice(4, 4),), ..., torch.tensor([0, 2])])
def test_an_index_means_what_it_means_in_torch(index, memory):
    lazy = save(memory).tensors["b"]
    assert torch.equal(lazy[index], state()["b"][index])


@pytest.mark.parametrize("reader", [1, 2, 3, 4])
def test_a_part_is_fetched_without_the_rest(reader, memory, monkeypatch):
    """Written by two, read by any number, rows and columns; what is written in columns is compact for whoever reads columns."""
    played(2, lambda peers: written(memory, peers))
    opened, tensors = cairn.open(memory), state()
    _ = opened.tensors
    fetched, original = [0], type(file_system(opened.path)).cat_file

    def counting(self, path, start=None, end=None, **more):
        data = original(self, path, start=start, end=end, **more)
        fetched[0] += len(data)
        return data

    monkeypatch.setattr(type(file_system(opened.path)), "cat_file", counting)
    for name in ("a", "b", "e"):
        for rank in range(reader):
            part = part_for(name, tensors[name], rank, reader)
            fetched[0] = 0
            opened.tensors[name].read_part(part)
            assert fetched[0] <= max(1.05 * part.count * tensors[name].element_size(), fragments.GAP)
    part = part_for("c", tensors["c"], 0, 2)
    fetched[0] = 0
    opened.tensors["c"].read_part(part)
    assert fetched[0] == part.count * 4
    wide = torch.randn(3, 100_000)
    opened = save(f"{memory}-wide", {"w": wide})
    fetched[0], lazy = 0, opened.tensors["w"]
    assert torch.equal(lazy[:, 500:510], wide[:, 500:510])
    assert fetched[0] < 3 * 40 + len((opened.path / fragments.INDEX).read_bytes()) + 1


def test_nothing_is_there_until_the_manifest_is_and_nothing_is_left_of_what_failed(memory):
    with pytest.raises(CairnError, match="not written exactly once"), write.Writer(memory) as writer:
        writer.put_json("config.json", {})
        writer.declare("model", [write.spec_of("x", torch.zeros(4))])
        writer.put_bytes("model", "x", 0, memoryview(bytes(8)))
        with pytest.raises(NotFoundError):
            cairn.open(memory)
        writer.publish(ORIGIN)
    assert sizes(place(memory)) == {}
    digest = save(memory).digest
    with pytest.raises(InputError, match="never overwritten"):
        save(memory, {"other": torch.zeros(1)})
    assert cairn.open(memory).digest == digest
    # What a killed writer leaves has no manifest: it does not exist for readers, and no other writer mixes with it.
    (place(memory) / MANIFEST).unlink()
    with pytest.raises(CairnError):
        cairn.open(memory)
    with pytest.raises(InputError, match="unfinished"):
        save(memory)


def test_of_two_writers_that_race_one_is_refused(memory):
    with write.Writer(memory) as late:
        late.declare("model", [write.spec_of("x", torch.zeros(4))])
        early = save(memory).digest
        with pytest.raises(InputError, match="appeared while"):
            late.put_json("config.json", {"model_type": "y"})
    assert cairn.open(memory).digest == early and verify.verify(memory).sound


def test_an_error_of_one_leaves_nothing_of_any(memory, monkeypatch):
    monkeypatch.setattr(fragments, "FRAGMENT_BYTES", 2**20)  # some have been sent by then
    original = fragments.LogicalFile.put_part

    def refusing(self, spec, part, data):
        if spec.name == "b":
            raise PermissionError(13, "Access denied")
        original(self, spec, part, data)

    monkeypatch.setattr(fragments.LogicalFile, "put_part", refusing)

    def put(peers):
        with write.Writer(memory, peers) as writer:
            writer.declare("model", [write.spec_of(name, tensor) for name, tensor in state().items()])
            writer.put_all({"model": state()})

    results = played(2, put)
    assert all(isinstance(result, InputError) and "Access denied" in str(result) for result in results), results
    assert sizes(place(memory)) == {}


def test_damage_is_named_with_its_tensors(memory):
    opened = save(memory)
    name = max(name for name in opened.manifest.fragments if name.endswith(".bin"))
    box = next(box for box in fragments.load_index(opened.path, opened.manifest)["model.safetensors"]._pieces["b"])
    data = bytearray((opened.path / box.fragment).read_bytes())
    data[box.begin] ^= 255
    (opened.path / box.fragment).write_bytes(bytes(data))
    report = verify.verify(memory)
    assert [damage.file for damage in report.damage] == ["model.safetensors"] and "b" in report.damage[0].tensors
    with pytest.raises(CairnError, match="damaged"):
        copy(opened, f"{memory}-copy")
    assert sizes(place(f"{memory}-copy")) == {}

    index = place(memory) / fragments.INDEX
    sound = index.read_bytes()
    index.write_bytes(sound.replace(b"[0,", b"[9,", 1))
    assert not verify.verify(memory).sound
    index.write_bytes(b"x" * len(sound))
    assert "not valid JSON" in str(verify.verify(memory).damage[0])
    with pytest.raises(DamagedError, match="not valid JSON"):
        _ = cairn.open(memory).tensors
    document = json.loads(sound)
    document["files"]["model.safetensors"]["tensors"]["a"].pop()
    index.write_bytes(json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode().ljust(len(sound)))
    with pytest.raises(DamagedError, match="boxes of tensor 'a' do not make up"):
        _ = cairn.open(memory).tensors
    index.write_bytes(sound)

    file_system(opened.path).rm_file(key(opened.path / name))
    assert any(damage.file == name and "missing" in damage.problem for damage in verify.verify(memory).damage)
    with pytest.raises(DamagedError, match="missing"):
        cairn.open(memory)


def test_an_older_reader_is_told_to_upgrade(memory, monkeypatch):
    from cairn.checkpoint.format import manifest

    save(memory)
    monkeypatch.setattr(manifest, "FORMAT", 1)
    with pytest.raises(DamagedError, match="Upgrade"):
        cairn.open(memory)


def test_the_digest_of_a_model_that_is_cut_in_a_store_is_that_of_the_whole(memory, tmp_path):
    cut, whole = save(memory, shard_bytes=6 * 2**20), save(tmp_path / "whole")
    assert len(cut.tensors.layouts) > 1 and cut.model_digest == whole.model_digest and verify.verify(memory).sound


def test_a_plain_directory_that_was_copied_into_a_store_opens_there(memory, tmp_path):
    plain = save(tmp_path / "plain", shard_bytes=6 * 2**20)
    for path in plain.files():
        (place(memory) / path.name).write_bytes(path.read_bytes())
    opened = cairn.open(memory)
    assert opened.digest == plain.digest and verify.verify(memory).sound
    assert opened.model_digest == plain.model_digest == save(tmp_path / "whole").model_digest
    for name, tensor in state().items():
        assert torch.equal(opened.tensors[name].load(), tensor)
        assert torch.equal(opened.tensors[name].read_part(part_for(name, tensor, 1, 3)), tensor[part_for(name, tensor, 1, 3).slices])


@pytest.mark.parametrize(
    ("path", "directory", "told"),
    [
        ("s3://a/run/checkpoints/step-5", "s3://a/run/checkpoints", "step-5"),
        ("s3://a/other/c", "s3://a/run/checkpoints", "../../other/c"),
        ("s3://a/run/c", "s3://a/", "run/c"),
        ("s3://a/c", "s3://b", "s3://a/c"),
        ("s3://a/c", "/tmp/runs", "s3://a/c"),
        ("/tmp/runs/c", "/tmp/out", "../runs/c"),
        ("/tmp/runs/c", "s3://a/run", "/tmp/runs/c"),
    ],
)
def test_a_parent_is_found_from_its_child(path, directory, told, monkeypatch):
    pytest.importorskip("s3fs")
    monkeypatch.setattr("cairn.checkpoint.format.trust._here", {("store", "s3://a")})
    assert way(place(path), place(directory)) == told
    assert str(follow(place(directory), told).resolve()) == path


def test_what_can_not_be_opened_is_one_sentence(tmp_path, small_recipe, memory):
    for url, words in (("nosuch://a/b", "cannot be opened"), ("memory://nothing/here", "no checkpoint or run")):
        with pytest.raises(InputError, match=words):
            cairn.open(url)
    with pytest.raises(InputError, match=r"checkpoint\.store=memory"):
        train(small_recipe, memory)


def test_a_plain_path_needs_no_store_library(tmp_path):
    code = (
        "import sys, cairn; from cairn.checkpoint.saving import write; from cairn.checkpoint.format.lineage import Lineage; import torch; "
        "write.save(sys.argv[1], model={'x': torch.ones(3)}, config={}, lineage=Lineage(kind='run', name='train')); "
        "cairn.open(sys.argv[1]).tensors['x'].load(); cairn.verify(sys.argv[1]); assert not {'fsspec', 'upath', 's3fs'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_run_in_a_store_resumes_exactly_and_lets_old_checkpoints_go(small_recipe, small_run, tmp_path):
    url = f"memory://{uuid.uuid4().hex}/run"
    run = train(small_recipe, tmp_path / "run", [f"checkpoint.store={url}", "checkpoint.keep=2"], stop_at_step=10)
    assert not (tmp_path / "run" / "checkpoints").exists() and [path.name for path in run.checkpoints()] == ["step-00000005", "step-00000010"]
    # Another machine: the run's directory is gone, and a killed save has left a step without a manifest.
    (place(url) / "checkpoints" / "step-00000015" / "config.json").write_bytes(b"{}")
    with pytest.raises(ResumeError, match="--run DIR"):
        resume(url)
    with pytest.raises(ResumeError, match=r"checkpoint\.store"):
        resume(url, ["checkpoint.store=memory://elsewhere"], run=tmp_path / "again")
    again = resume(url, run=tmp_path / "again")
    assert again.newest().model_digest == small_run.newest().model_digest
    assert [row["loss"] for row in again.metrics()] == [row["loss"] for row in small_run.metrics()][10:]
    assert [path.name for path in Run(tmp_path / "again").checkpoints()] == ["step-00000015", "step-00000020"]
    assert "step-00000005" not in {path.name for path in (place(url) / "checkpoints").iterdir()}


def test_every_run_has_a_place_of_its_own(small_recipe, tmp_path):
    url = f"memory://{uuid.uuid4().hex}/run"
    train(small_recipe, tmp_path / "run", [f"checkpoint.store={url}"], stop_at_step=5)
    with pytest.raises(InputError, match="checkpoints of another run"):
        train(small_recipe, tmp_path / "other", [f"checkpoint.store={url}"])
    with pytest.raises(InputError, match="checkpoints of another run"):
        fork(url, tmp_path / "other", [f"checkpoint.store={url}"])
    assert not (tmp_path / "other").exists()
    branch = fork(url, tmp_path / "branch", ["optimizer.lr=1e-3"], stop_at_step=10)
    assert [path.name for path in branch.checkpoints()] == ["step-00000010"] and branch.newest().path.is_relative_to(tmp_path)
    entries = cairn.log(branch.newest())
    assert entries[1]["here"] and entries[1]["path"] == f"{url}/checkpoints/step-00000005"
