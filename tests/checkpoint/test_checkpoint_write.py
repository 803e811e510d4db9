"""Writing: valid safetensors in one pass, atomic, digested, never overwriting; nothing left when it fails."""

import itertools
import json
import os
import resource
import shutil
import time

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cairn.checkpoint.format import blocks, layout, read, verify
from cairn.checkpoint.format.dtypes import DTYPES
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.manifest import BLOCK_BYTES, Manifest, block_digest
from cairn.checkpoint.saving import disk, write
from cairn.errors import DamagedError, InputError, NotFoundError
from tests import faults

ORIGIN = Lineage(kind="run", name="train")
TENSORS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16), "n": torch.tensor(7)}


def save(path, tensors=None, **more):
    return write.save(path, model=tensors or TENSORS, config={"model_type": "none"}, lineage=ORIGIN, **more)


def shapes():
    return st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=60)
@given(st.dictionaries(st.text("abc.é", min_size=1, max_size=6), st.tuples(st.sampled_from(sorted(DTYPES)), shapes()), min_size=1, max_size=6))
def test_any_names_dtypes_and_shapes_are_read_back_by_safetensors(tmp_path_factory, specs):
    path = tmp_path_factory.mktemp("any") / "c"
    tensors = {name: torch.randint(0, 2, shape).to(DTYPES[code]) for name, (code, shape) in specs.items()}
    checkpoint = save(path, tensors)
    theirs = load_file(path / "model.safetensors")
    assert set(theirs) == set(tensors)
    for name, tensor in tensors.items():
        for found in (theirs[name], checkpoint.tensors[name].load(), checkpoint.tensors.load()[name]):
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    header = layout.read_layout(path / "model.safetensors")
    assert len(header.header) % layout.ALIGNMENT == 0


@pytest.mark.parametrize("shard_bytes", [None, 1, 60])
def test_the_state_decides_the_digest_not_who_wrote_it_when(tmp_path, shard_bytes):
    first = save(tmp_path / "first", shard_bytes=shard_bytes)
    time.sleep(1.1)
    second = write.save(tmp_path / "second", model=TENSORS, config={"model_type": "none"}, lineage=Lineage.record("run", "resume"), shard_bytes=shard_bytes)
    assert first.digest == second.digest and first.model_digest == second.model_digest
    other = save(tmp_path / "other", TENSORS | {"n": torch.tensor(8)}, shard_bytes=shard_bytes)
    assert other.digest != first.digest


def test_numbered_files_have_the_index_that_transformers_reads(tmp_path):
    checkpoint = save(tmp_path / "c", shard_bytes=60)
    index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(TENSORS) and len(set(index["weight_map"].values())) == 2
    for name, file in index["weight_map"].items():
        with safetensors.safe_open(tmp_path / "c" / file, "pt") as opened:
            assert torch.equal(opened.get_tensor(name), TENSORS[name])
    assert torch.equal(checkpoint.tensors["a"].load(), TENSORS["a"])


@pytest.mark.parametrize("shard_bytes", [1, 60])
def test_the_digest_of_a_model_does_not_depend_on_how_many_files_it_is_cut_into(tmp_path, shard_bytes):
    whole = save(tmp_path / "whole")
    cut = save(tmp_path / "cut", shard_bytes=shard_bytes)
    other = save(tmp_path / "other", TENSORS | {"n": torch.tensor(8)}, shard_bytes=shard_bytes)
    assert cut.model_digest == whole.model_digest != other.model_digest
    assert cut.digest != whole.digest and verify.verify(cut.path).sound
    plain = tmp_path / "plain"  # the same files without a manifest: what another program would have written
    shutil.copytree(cut.path, plain)
    for name in ("manifest.json", "lineage.json"):
        (plain / name).unlink()
    assert read.open(plain).model_digest == whole.model_digest


def test_a_model_that_passes_for_another_is_found_out(tmp_path):
    save(tmp_path / "cut", shard_bytes=60)
    other = save(tmp_path / "other", TENSORS | {"n": torch.tensor(8)}, shard_bytes=60)
    file = tmp_path / "cut" / "manifest.json"
    said = Manifest.load(file.parent)
    file.write_bytes(Manifest.of(said.files, uncut=other.manifest.uncut).dump())
    assert read.open(file.parent).model_digest == other.model_digest
    assert "as one file is not what lies" in str(verify.verify(file.parent).damage[0])
    file.write_bytes(Manifest.of(save(tmp_path / "whole").manifest.files, uncut=other.manifest.uncut).dump())
    with pytest.raises(DamagedError, match="not cut"):
        Manifest.load(file.parent)


def test_ranges_may_come_in_any_order_from_any_thread(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    tensor = torch.arange(3_000_000, dtype=torch.float32)
    data = write.as_bytes(tensor)
    cuts = [0, 1, 4_000_001, 5_000_000, len(data)]
    with write.Writer(tmp_path / "c") as writer:
        writer.put_json("config.json", {})
        writer.declare("model", [write.spec_of("x", tensor)])
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda i: writer.put_bytes("model", "x", cuts[i], data[cuts[i] : cuts[i + 1]]), [3, 1, 0, 2]))
        checkpoint = writer.publish(ORIGIN)
    assert torch.equal(checkpoint.tensors["x"].load(), tensor)
    assert checkpoint.model_digest == write.save(tmp_path / "d", model={"x": tensor}, config={}, lineage=ORIGIN).model_digest
    assert verify.verify(tmp_path / "c").sound


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_busy_writer_digests_what_it_writes_and_reads_back_only_what_it_must(tmp_path_factory, data):
    """Cuts anywhere, in any order: the digest is that of a writer with threads; small or ordered pieces are never read back."""
    tensors = {name: torch.randn(700_000 + 13 * number) for number, name in enumerate("abc")}
    specs = [write.spec_of(name, tensor) for name, tensor in tensors.items()]
    folder = tmp_path_factory.mktemp("busy")
    lineage = Lineage(kind="run", name="train")
    pieces = []
    for name, tensor in tensors.items():
        cuts = sorted({0, tensor.nbytes, *data.draw(st.lists(st.integers(1, tensor.nbytes - 1), max_size=4))})
        pieces += [(name, begin, end) for begin, end in itertools.pairwise(cuts)]
    ordered = data.draw(st.booleans())
    pieces = pieces if ordered else data.draw(st.permutations(pieces))
    found = {}
    for busy in (False, True):
        with write.Writer(folder / f"{busy}", busy=busy) as writer, pytest.MonkeyPatch.context() as patch:
            writer.declare("model", specs)
            writer.put_json("config.json", {})
            if busy and ordered:
                patch.setattr(disk, "block_digest", None)
            for name, begin, end in pieces:
                writer.put_bytes("model", name, begin, write.as_bytes(tensors[name])[begin:end])
            found[busy] = writer.publish(lineage)
        assert verify.verify(folder / f"{busy}").sound
    assert found[False].digest == found[True].digest


@given(st.permutations(range(9)), st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_a_running_digest_is_the_blocks_or_unknown(turns, large):
    """`large` pieces are too long to be kept: the digest is known unless one of them comes out of turn."""
    lengths = [blocks.KEPT_BYTES + 1 if number < large else 1000 + number for number in range(9)]
    begins = [sum(lengths[:number]) for number in range(9)]
    contents = os.urandom(sum(lengths))
    running, arrived, in_turn = blocks.Running(), set(), True
    for number in turns:
        upto = next((n for n in range(9) if n not in arrived), 9)
        in_turn = in_turn and (number >= large or number == upto)
        arrived.add(number)
        running.take(begins[number], memoryview(contents)[begins[number] : begins[number] + lengths[number]])
    assert running.digest() == (block_digest(contents) if in_turn else None)


def test_a_hole_or_a_byte_written_twice_is_never_published(tmp_path):
    with pytest.raises(Exception, match="not written exactly once"), write.Writer(tmp_path / "c") as writer:
        writer.declare("model", [layout.TensorSpec("x", "F32", (4,))])
        writer.put_bytes("model", "x", 0, memoryview(bytes(8)))
        writer.publish(ORIGIN)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_ever_overwritten(tmp_path):
    before = save(tmp_path / "c").digest
    with pytest.raises(InputError, match="never overwritten"):
        save(tmp_path / "c", {"other": torch.zeros(1)})
    assert read.open(tmp_path / "c").digest == before and [p.name for p in tmp_path.iterdir()] == ["c"]


def test_parts_are_read_without_the_rest(tmp_path):
    tensor = torch.randn(50, 30)
    lazy = save(tmp_path / "c", {"x": tensor}).tensors["x"]
    assert torch.equal(lazy[7:11], tensor[7:11]) and torch.equal(lazy[:, 3:9], tensor[:, 3:9]) and torch.equal(lazy[4, 5:], tensor[4, 5:])


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    """The limit on file size stands in for a disk: the system refuses the bytes with the same kind of error."""
    code = """
import resource, signal, sys, torch
from cairn.checkpoint.saving import write
from cairn.checkpoint.format.lineage import Lineage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
write.save(sys.argv[1], model={"x": torch.zeros(1_000_000)}, config={}, lineage=Lineage(kind="run", name="train"))
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)
    process = faults.python(code, str(tmp_path / "c"))
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0 and "was not written" in error and "Nothing was left behind" in error
    assert list(tmp_path.iterdir()) == []


SAVING = """
import sys, torch
from pathlib import Path
from cairn.checkpoint.saving import write
from cairn.checkpoint.format.lineage import Lineage
folder = Path(sys.argv[1])
state = {f"layer.{i}": torch.randn(400, 500) for i in range(20)}
step = 0
while True:
    step += 1
    origin = Lineage(kind="run", name="train")
    write.save(folder / "checkpoints" / f"step-{step:08d}", model=state, config={}, trainer={"step": step, "tokens": step}, lineage=origin)
"""


def test_a_kill_at_any_moment_leaves_every_visible_checkpoint_whole(tmp_path):
    """Killed in the middle of saving, at six random moments; then what is visible verifies and the rest is swept."""
    for number, delay in enumerate(faults.moments(3, 6, 0.25)):
        run = tmp_path / str(number)
        process = faults.python(SAVING, str(run))
        began: list[float] = []

        def ready(run=run, began=began, delay=delay) -> bool:
            if not began and len(read.list_checkpoints(run)) >= 2:
                began.append(time.monotonic())
            return bool(began) and time.monotonic() - began[0] > delay

        assert faults.kill_when(process, ready)
        complete = read.list_checkpoints(run)
        assert len(complete) >= 2 and all(verify.verify(path).sound for path in complete)
        assert read.open(run).path == complete[-1]
        write.sweep(run / "checkpoints")
        assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [p.name for p in complete]


def test_a_living_writer_is_never_swept(tmp_path):
    with write.Writer(tmp_path / "c") as writer:
        assert write.sweep(tmp_path) == []
        writer.put_json("config.json", {})
        writer.declare("model", [layout.TensorSpec("x", "F32", (1,))])
        writer.put("model", "x", torch.ones(1))
        writer.publish(ORIGIN)
    assert read.open(tmp_path / "c").tensors["x"].load() == 1


def test_damage_is_named_with_its_block_and_tensors(tmp_path):
    tensors = {"first": torch.zeros(BLOCK_BYTES // 4), "second": torch.ones(BLOCK_BYTES // 4)}
    save(tmp_path / "c", tensors)
    assert verify.verify(tmp_path / "c").sound
    begin, _ = layout.read_layout(tmp_path / "c" / "model.safetensors").ranges["second"]
    faults.flip(tmp_path / "c" / "model.safetensors", begin + BLOCK_BYTES // 2)
    (damage,) = verify.verify(tmp_path / "c").damage
    assert damage.block == 1 and "second" in damage.tensors and damage.file == "model.safetensors"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "lineage.json"])
def test_a_missing_or_cut_file_is_damage(tmp_path, file):
    save(tmp_path / "c")
    path = tmp_path / "c" / file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedError, match=file):
        read.open(tmp_path / "c")
    os.unlink(path)
    assert "missing" in str(verify.verify(tmp_path / "c").damage[0])


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff" * 8,
        (10**15).to_bytes(8, "little"),
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"{{{{",
        (61).to_bytes(8, "little") + b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,800000000]}}',
        (54).to_bytes(8, "little") + b'{"x":{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}}',
        (51).to_bytes(8, "little") + b'{"x":{"dtype":"XX","shape":[1],"data_offsets":[0,4]}} '[:51] + b"1234",
    ],
)
def test_hostile_headers_are_refused(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(header)
    with pytest.raises(DamagedError):
        layout.read_layout(tmp_path / "model.safetensors")


def test_an_index_can_not_reach_outside_its_directory(tmp_path):
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(DamagedError, match="outside"):
        read.TensorFolder(tmp_path / "c", "model")
    manifest = json.loads((save(tmp_path / "d").path / "manifest.json").read_text())
    manifest["files"]["../secret.safetensors"] = {"size": 1, "blocks": []}
    (tmp_path / "d" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedError):
        read.open(tmp_path / "d")


def test_what_is_not_there_or_not_complete_does_not_open(tmp_path):
    with pytest.raises(NotFoundError):
        read.open(tmp_path / "nothing")
    with pytest.raises(NotFoundError, match="neither"):
        read.open(tmp_path)
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(NotFoundError, match="no complete checkpoint"):
        read.open(tmp_path / "run")
    save(tmp_path / "c", trainer={"step": 1, "tokens": 2})
    os.unlink(tmp_path / "c" / "manifest.json")
    with pytest.raises(DamagedError, match=r"no manifest.json"):
        read.open(tmp_path / "c")


def test_a_later_format_is_refused_by_name(tmp_path):
    save(tmp_path / "c")
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text()) | {"format": 99}
    (tmp_path / "c" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedError, match="format 99"):
        read.open(tmp_path / "c")


def test_no_file_of_a_checkpoint_is_a_pickle(small_run):
    for path in small_run.newest().files():
        start = path.read_bytes()[:2]
        assert path.suffix in (".json", ".safetensors") and not start.startswith(b"\x80") and start != b"PK"
