"""Parts of tensors: the runs of bytes that they are, who writes which, and files that several processes write together."""

import json
import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cairn.checkpoint.format import lazy, read, verify
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.parts import Part, owners, part_of, spans
from cairn.checkpoint.saving import disk, write
from cairn.checkpoint.saving.peers import Peers
from cairn.errors import InputError, MismatchError
from tests.faults import torchrun


@st.composite
def boxes(draw):
    whole = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    begins = [draw(st.integers(0, size)) for size in whole]
    return whole, Part("w", tuple(begins), tuple(draw(st.integers(0, size - begin)) for size, begin in zip(whole, begins, strict=True)))


@given(boxes())
def test_spans_are_the_items_of_the_box_in_order(case):
    whole, part = case
    numbers = np.arange(math.prod(whole)).reshape(whole)
    found = [item for span in spans(whole, part) for item in range(span.outer, span.outer + span.items)]
    assert found == numbers[part.slices].ravel().tolist()
    assert [span.inner for span in spans(whole, part)] == np.cumsum([0, *(s.items for s in spans(whole, part))])[:-1].tolist()


def test_every_item_has_one_owner_and_the_work_is_even():
    shapes = {f"w{i}": (8, 4) for i in range(6)}
    everywhere = [Part(name, (0, 0), shape) for name, shape in shapes.items()]
    mine = owners([everywhere] * 3, shapes)
    assert sorted(part.name for parts in mine for part in parts) == sorted(shapes) and [len(parts) for parts in mine] == [2, 2, 2]


@pytest.mark.parametrize("held", [[Part("w", (0,), (3,))], [Part("w", (0,), (4,)), Part("w", (2,), (2,))]])
def test_gaps_and_overlaps_are_refused(held):
    with pytest.raises(MismatchError, match="items of 'w'"):
        owners([held], {"w": (4,)})


class Threads(Peers):
    """Processes played by threads."""

    def __init__(self, rank, size, shared):
        self.rank, self.size, self._shared = rank, size, shared

    def gather(self, item):
        self._shared["items"][self.rank] = item
        self._shared["barrier"].wait()
        found = list(self._shared["items"])
        self._shared["barrier"].wait()
        return found


def played(size, action):
    """Run `action(peers)` in `size` threads; returns what each raised or returned."""
    shared = {"items": [None] * size, "barrier": threading.Barrier(size, timeout=60)}
    results = [None] * size

    def play(rank):
        try:
            results[rank] = action(Threads(rank, size, shared))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=play, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def state():
    """Odd shapes, some larger than a block, two dtypes, a scalar and an empty tensor."""
    g = torch.Generator().manual_seed(0)
    tensors = {"a": torch.randn(1031, 1301, generator=g), "b": torch.randn(7, 5, 3, generator=g), "c": torch.randn(9000, 300, generator=g)}
    return tensors | {"d": torch.tensor(3.5), "e": torch.randn(11, generator=g).to(torch.bfloat16), "f": torch.zeros(0, 4)}


CUTS = {"a": 0, "b": 1, "c": 1, "e": 0}


def part_for(name, tensor, rank, size):
    """Rank's piece along the cut of this tensor, in ceil blocks as DTensor cuts; all of it where it is not cut."""
    begin, shape = [0] * tensor.dim(), list(tensor.shape)
    if name in CUTS:
        block = -(-tensor.shape[CUTS[name]] // size)
        begin[CUTS[name]] = min(rank * block, tensor.shape[CUTS[name]])
        shape[CUTS[name]] = max(0, min(block, tensor.shape[CUTS[name]] - rank * block))
    return Part(name, tuple(begin), tuple(shape))


def written(path, peers, tensors=None):
    tensors = state() if tensors is None else tensors
    with write.Writer(path, peers) as writer:
        writer.put_json("config.json", {"model_type": "x"})
        writer.declare("model", [write.spec_of(name, tensor) for name, tensor in tensors.items()])
        held = peers.gather([part_for(name, tensor, peers.rank, peers.size) for name, tensor in tensors.items()])
        for part in owners(held, {name: tuple(tensor.shape) for name, tensor in tensors.items()})[peers.rank]:
            writer.put_part("model", part, tensors[part.name][part.slices].contiguous())
        return writer.publish(Lineage(kind="run", name="train"))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_files_do_not_depend_on_how_many_wrote_them(size, tmp_path):
    alone = write.save(tmp_path / "alone", model=state(), config={"model_type": "x"}, lineage=Lineage(kind="run", name="train"))
    results = played(size, lambda peers: written(tmp_path / "many", peers))
    assert all(isinstance(result, read.Checkpoint) for result in results), results
    assert (tmp_path / "many" / "model.safetensors").read_bytes() == (tmp_path / "alone" / "model.safetensors").read_bytes()
    assert results[0].digest == alone.digest and verify.verify(results[0].path).sound


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_part_is_read_and_no_other_byte(size, tmp_path, monkeypatch):
    tensors = state()
    opened = write.save(tmp_path / "c", model=tensors, config={}, lineage=Lineage(kind="run", name="train"))
    count = [0]
    original = lazy.MappedFile._fill
    monkeypatch.setattr(lazy.MappedFile, "_fill", lambda self, target, at: (count.__setitem__(0, count[0] + len(target)), original(self, target, at))[1])
    for rank in range(size):
        for name, tensor in tensors.items():
            part = part_for(name, tensor, rank, size)
            count[0] = 0
            assert torch.equal(opened.tensors[name].read_part(part), tensor[part.slices])
            whole = part.count == tensor.numel()  # what is read whole is also verified, by whole blocks
            assert whole or count[0] <= part.count * tensor.element_size()


def test_bytes_that_nobody_wrote_are_noticed(tmp_path):
    def forgetful(peers):
        with write.Writer(tmp_path / "c", peers) as writer:
            writer.declare("model", [write.spec_of("a", state()["a"])])
            if peers.first:
                writer.put_part("model", Part("a", (0, 0), (500, 1301)), state()["a"][:500].contiguous())
            return writer.publish(Lineage(kind="run", name="train"))

    results = played(2, forgetful)
    assert all("not written exactly once" in str(result) for result in results) and list(tmp_path.iterdir()) == []


def test_an_error_of_one_is_the_error_of_all_and_nothing_is_left(tmp_path, monkeypatch):
    """The disk is full for one of three."""
    (tmp_path / "there").mkdir()
    results = played(3, lambda peers: written(tmp_path / "there", peers))
    assert all(isinstance(result, InputError) and "never overwritten" in str(result) for result in results)

    unlucky, original = [], disk.OpenFile.write

    def sometimes(file, begin, data):
        if threading.get_ident() in unlucky:
            raise OSError(28, "No space left on device")
        original(file, begin, data)

    monkeypatch.setattr(disk.OpenFile, "write", sometimes)

    def full(peers):
        with write.Writer(tmp_path / "c", peers) as writer:
            tensors = state()
            writer.declare("model", [write.spec_of(name, tensor) for name, tensor in tensors.items()])
            if peers.rank == 1:
                unlucky.append(threading.get_ident())
            writer.put_all({"model": tensors})
            return writer.publish(Lineage(kind="run", name="train"))

    results = played(3, full)
    assert all(isinstance(result, InputError) and "disk is full" in str(result) for result in results), results
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


WORKER = """
import json, os, sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from cairn.checkpoint.format import read
from cairn.checkpoint.saving import write
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.parts import local_of, part_of
from cairn.checkpoint.saving.peers import Group

folder = sys.argv[1]
dist.init_process_group("gloo")
whole = torch.arange(7 * 5, dtype=torch.float32).reshape(7, 5)
meshes = {"one": init_device_mesh("cpu", (3,)), "two": init_device_mesh("cpu", (1, 3))}
layouts = {
    "rows": (meshes["one"], [Shard(0)]), "columns": (meshes["one"], [Shard(1)]), "copies": (meshes["one"], [Replicate()]),
    "both": (meshes["two"], [Shard(0), Shard(1)]), "copied-rows": (meshes["two"], [Replicate(), Shard(0)]),
}
peers = Group(dist.group.WORLD)
for source, (mesh, placements) in layouts.items():
    tensor = distribute_tensor(whole, mesh, placements)
    both = {"w": tensor, "plain": whole.clone()}
    checkpoint = write.save(f"{folder}/{source}", model=both, config={}, lineage=Lineage(kind="run", name="train"), peers=peers)
    for target, (mesh, placements) in layouts.items():
        like = distribute_tensor(torch.zeros(7, 5), mesh, placements)
        part = part_of("w", like)
        assert torch.equal(checkpoint.tensors["w"].read_part(part), whole[part.slices]), (source, target)
        local_of(like).copy_(checkpoint.tensors["w"].read_part(part))
        assert torch.equal(like.full_tensor(), whole), (source, target)
open(f"{folder}/digests-{peers.rank}.json", "w").write(json.dumps({name: read.open(f"{folder}/{name}").digest for name in layouts}))
os._exit(0)
"""


def test_dtensors_of_any_layout_are_read_in_any_other(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun(3, tmp_path / "worker.py", str(tmp_path))
    digests = [json.loads((tmp_path / f"digests-{rank}.json").read_text()) for rank in range(3)]
    assert digests[0] == digests[1] == digests[2] and len(set(digests[0].values())) == 1
    whole = torch.arange(35.0).reshape(7, 5)
    alone = write.save(tmp_path / "alone", model={"w": whole, "plain": whole}, config={}, lineage=Lineage(kind="run", name="train"))
    assert alone.digest == digests[0]["rows"] and part_of("w", whole) == Part("w", (0, 0), (7, 5))


PLACED = """
import os, sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.parts import local_of, part_of
from cairn.checkpoint.saving import write
from cairn.checkpoint.saving.modules import fill_all
from cairn.checkpoint.saving.peers import Group
from cairn.errors import MismatchError

folder = sys.argv[1]
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("shard", "tensor"))
pair = init_device_mesh("cpu", (2,))

def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5, bias=False))

def placed(kind, seed):
    model = network(seed)
    if kind == "fsdp2":  # 5 rows and 2 processes: uneven
        return fully_shard(model, mesh=pair)
    model = parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["shard"]) if kind == "both" else model

origin = Lineage(kind="run", name="train")
peers, truth = Group(dist.group.WORLD), network(0).state_dict()
alone = write.save(f"{folder}/alone-{peers.rank}", model=truth, config={}, lineage=origin)
for source in ("fsdp2", "tensor", "both"):
    written = write.save(f"{folder}/{source}", model=dict(placed(source, 0).named_parameters()), config={}, lineage=origin, peers=peers)
    assert written.digest == alone.digest, source
    for target in ("fsdp2", "tensor", "both"):
        found = dict(placed(target, 1).named_parameters())
        fill_all(found, written.tensors, "weights")
        for name, parameter in found.items():
            assert torch.equal(local_of(parameter), truth[name][part_of(name, parameter).slices]), (source, target, name)
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            assert torch.equal(whole.detach(), truth[name]), (source, target, name)
half = DTensor.from_local(torch.ones(4), pair, [Partial()])
try:
    part_of("half", half)
    raise AssertionError("a sum that is still to be made was stored")
except MismatchError as error:
    assert "'half' is a sum that is still to be made" in str(error)
open(f"{folder}/done-{peers.rank}", "w").write("all of it")
os._exit(0)
"""


def test_modules_of_fsdp2_and_tensor_parallelism_are_written_and_read_in_each_others_layout(tmp_path):
    (tmp_path / "worker.py").write_text(PLACED)
    torchrun(2, tmp_path / "worker.py", str(tmp_path))
    assert all((tmp_path / f"done-{rank}").is_file() for rank in range(2))
