"""torch.distributed.checkpoint over our files: what it saves is a checkpoint, and it loads any checkpoint in any layout."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

import cairn
from cairn.checkpoint.format import verify
from cairn.checkpoint.saving.dcp import DcpReader, DcpWriter
from tests.faults import torchrun

WORKER = """
import gc, os, sys
import torch, torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM
from cairn.checkpoint.saving.dcp import DcpReader, DcpWriter

folder, store = sys.argv[1:]
dist.init_process_group("cpu:gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
config = LlamaConfig(vocab_size=33, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, tie_word_embeddings=False)


def built(seed):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def step(model, optimizer, seed):
    ids = torch.randint(0, 33, (2, 8), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def state(model, optimizer):
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "trainer": {"step": 3, "names": ["a", "b"], "pair": (1, 2.5)}}


model, optimizer = built(0)
step(model, optimizer, 1)
saved = state(model, optimizer)
name = "model.embed_tokens.weight"
embedding = saved["model"][name].full_tensor().clone()
dcp.save(saved, storage_writer=DcpWriter(f"{folder}/rows", config=config))
dcp.async_save(saved, storage_writer=DcpWriter(f"{folder}/later", config=config)).result()
if store:
    dcp.save(saved, storage_writer=DcpWriter(store, config=config))

# Back into another model with the same layout: the next updates are the same, bit for bit.
other, its = built(5)
step(other, its, 2)
found = state(other, its) | {"trainer": {"step": 0, "names": [], "pair": ()}}
dcp.load(found, storage_reader=DcpReader(f"{folder}/rows"))
set_state_dict(other, its, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
assert found["trainer"] == {"step": 3, "names": ["a", "b"], "pair": (1, 2.5)}, found["trainer"]
for each in (model, optimizer), (other, its):
    step(*each, 3)
assert all(torch.equal(a.to_local(), b.to_local()) for a, b in zip(model.parameters(), other.parameters(), strict=True))

# Back in columns, and replicated.
for placement in (Shard(1), Replicate()):
    like = {"model": {name: distribute_tensor(torch.zeros(33, 24), mesh, [placement])}}
    for where in [f"{folder}/rows"] + [store] * bool(store):
        dcp.load(like, storage_reader=DcpReader(where))
        assert torch.equal(like["model"][name].full_tensor(), embedding), placement

# What cannot be stored is one rank's to write: all of them hear of it.
try:
    dcp.save({"x": torch.zeros(2), "bad": {1, 2}}, storage_writer=DcpWriter(f"{folder}/refused"))
    raise SystemExit("it was saved")
except dcp.api.CheckpointException as error:
    assert "'bad' holds {1, 2}" in str(error), error
gc.collect()  # the writer goes, and what it had begun with it
dist.barrier()
os._exit(0)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory, s3):
    folder = tmp_path_factory.mktemp("dcp")
    (folder / "worker.py").write_text(WORKER)
    torchrun(2, folder / "worker.py", str(folder), f"{s3}/dcp")
    return folder


def test_what_two_ranks_save_is_a_checkpoint_that_transformers_opens(saved, s3):
    from transformers import LlamaForCausalLM

    opened = cairn.open(saved / "rows")
    assert verify.verify(saved / "rows").sound
    files = load_file(saved / "rows" / "model.safetensors")
    model = LlamaForCausalLM.from_pretrained(saved / "rows")
    assert set(files) == set(model.state_dict()) and all(torch.equal(model.state_dict()[name], tensor) for name, tensor in files.items())
    assert {"state.model.norm.weight.exp_avg", "state.model.norm.weight.step"} <= set(load_file(saved / "rows" / "optimizer.safetensors"))
    assert cairn.show(opened)["family"] == "llama" and opened.model().lm_head.weight.shape == (33, 24)
    later, stored = cairn.open(saved / "later"), cairn.open(f"{s3}/dcp")
    assert later.digest == opened.digest == stored.digest and verify.verify(f"{s3}/dcp").sound


def test_nothing_is_left_of_what_was_refused(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["later", "rows", "worker.py"]


def test_one_process_reads_what_two_wrote_and_the_reverse_of_a_layout(saved):
    whole = load_file(saved / "rows" / "model.safetensors")
    state = {"model": {name: torch.zeros_like(tensor) for name, tensor in whole.items()}}
    dcp.load(state, storage_reader=DcpReader(saved / "rows"), no_dist=True)
    assert all(torch.equal(state["model"][name], tensor) for name, tensor in whole.items())


def test_any_checkpoint_is_read_under_its_own_names(small_run):
    newest = small_run.newest()
    model = newest.model()
    for prefix, wrapped in (("", lambda state: state), ("model.", lambda state: {"model": state})):
        state = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in model.state_dict().items() if name in newest.tensors}
        dcp.load(wrapped(state), storage_reader=DcpReader(small_run.path, prefix=prefix), no_dist=True)
        assert all(torch.equal(state[name], lazy.load().double()) for name, lazy in newest.tensors.items())


def test_names_collisions_and_places_are_refused_in_plain_words(tmp_path, monkeypatch):
    monkeypatch.setattr("weakref.finalize", lambda *unused: None)  # nothing is left even while the writer lives on

    def save(state, name):
        with pytest.raises(CheckpointException) as met:
            dcp.save(state, storage_writer=DcpWriter(tmp_path / name), no_dist=True)
        return str(met.value)

    one = torch.zeros(2)
    assert "Two tensors would be called 'w'" in save({"w": one, "model": {"w": one}}, "a")
    assert "names a file" in save({"../x": {"w": one}}, "b")
    assert "'n' holds nan" in save({"w": one, "n": float("nan")}, "c")
    assert "safetensors cannot hold" in save({"w": one.to(torch.complex128)}, "d")
    (tmp_path / "there").mkdir()
    assert "never overwritten" in save({"w": one}, "there")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    dcp.save({"w": one, "nested": {"list": [{"a": one}, 3]}}, storage_writer=DcpWriter(tmp_path / "e"), no_dist=True)
    assert json.loads((tmp_path / "e" / "state.json").read_text())["leaves"]["nested.list.1"]["value"] == 3
    with pytest.raises(CheckpointException, match="Missing key"):
        dcp.load({"other": one}, storage_reader=DcpReader(tmp_path / "e"), no_dist=True)
