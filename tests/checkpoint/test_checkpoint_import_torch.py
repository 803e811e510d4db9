"""Folders that torch itself writes on gloo processes (FSDP1, torch.distributed.checkpoint), and what torch reads of ours."""

import shutil

import pytest
import torch

from cairn.checkpoint.foreign.export import export_dcp
from cairn.checkpoint.foreign.importing import import_
from cairn.errors import DamagedError, InputError, MismatchError, NotFoundError
from tests.faults import torchrun

WORKER = """
import copy, os, sys
from pathlib import Path
import torch, torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

dist.init_process_group("gloo")
out, rank = Path(sys.argv[1]), dist.get_rank()
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
config = LlamaConfig(vocab_size=33, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, head_dim=4)
fresh = LlamaForCausalLM(config)


def trained(model, parameters):
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for step in range(3):
        model(torch.arange(10)[None] + step).logits.float().pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def state(optimizer, names):
    return {f"{names[number]}/{key}": value for number, held in optimizer.state_dict()["state"].items() for key, value in held.items()}


plain = copy.deepcopy(fresh)
optimizer = trained(plain, plain.parameters())
if rank == 0:
    config.save_pretrained(out)
    names = [name for name, _ in plain.named_parameters()]
    torch.save({"model": plain.state_dict(), "optimizer": state(optimizer, names)}, out / "plain.pt")

for original in (False, True):
    model = FSDP(copy.deepcopy(fresh), auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}), device_id=torch.device("cpu"), use_orig_params=original)
    optimizer = trained(model, model.parameters())
    folder = out / ("named" if original else "flat")
    folder.mkdir(exist_ok=True)
    with FSDP.state_dict_type(model, StateDictType.LOCAL_STATE_DICT):
        held = model.state_dict()
    torch.save({"model": held, "optimizer": optimizer.state_dict()}, folder / f"model_rank{rank}_of_2.pt")

model = copy.deepcopy(fresh)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = trained(model, model.parameters())
weights, moments = get_state_dict(model, optimizer)
dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=out / "dcp")
columns = {"w": distribute_tensor(torch.arange(30.0).reshape(5, 6), mesh, [Shard(1)]), "same": distribute_tensor(torch.ones(3), mesh, [Replicate()])}
dcp.save(columns, checkpoint_id=out / "columns")
dist.barrier()
os._exit(0)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A tiny LLaMA of transformers after three updates by two processes, saved in every way."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("torch")
    (folder / "worker.py").write_text(WORKER)
    torchrun(2, folder / "worker.py", str(folder))
    return folder


def agrees(result, written):
    """The same as one process alone has after the same updates: two processes that average equal gradients compute the same bits."""
    full = torch.load(written / "plain.pt", weights_only=True)
    assert set(result.tensors) == set(full["model"])
    assert all(torch.equal(result.tensors[name].load(), tensor) for name, tensor in full["model"].items())
    assert set(result.optimizer) == set(full["optimizer"])
    assert all(torch.equal(result.optimizer[name].load(), tensor.reshape(result.optimizer[name].shape)) for name, tensor in full["optimizer"].items())
    assert any("exp_avg" in name for name in result.optimizer) and float(result.optimizer["model.norm.weight/step"].load()) == 3


@pytest.mark.parametrize("kind", ["flat", "named"])
def test_fsdp1(kind, written, tmp_path):
    result = import_(written / kind, tmp_path / "out", config=written / "config.json", pickles=True)
    assert result.lineage.options["layout"] == "fsdp1" and result.lineage.options["grid"] == {"data": 2}
    agrees(result, written)


def test_fsdp1_refuses_what_does_not_come_out(written, tmp_path):
    import json

    config = json.loads((written / "config.json").read_text())
    with pytest.raises(InputError, match="do not say which parameters lie in a flattened unit; give the model's config"):
        import_(written / "flat", tmp_path / "out", pickles=True)
    with pytest.raises(MismatchError, match=r"'model\.layers\.0\._flat_param' holds 1128 items, and the model that config\.json describes has 1164 there"):
        import_(written / "flat", tmp_path / "out", config=config | {"intermediate_size": 21}, pickles=True)
    shutil.copytree(written / "flat", tmp_path / "flat")
    (tmp_path / "flat" / "model_rank1_of_2.pt").unlink()
    with pytest.raises(NotFoundError, match="the file of data-parallel rank 1 is missing"):
        import_(tmp_path / "flat", tmp_path / "out", config=config, pickles=True)


def test_dcp(written, tmp_path):
    result = import_(written / "dcp", tmp_path / "out", config=written / "config.json", pickles=True)
    assert result.lineage.options["layout"] == "dcp"
    agrees(result, written)
    columns = import_(written / "columns", tmp_path / "columns", config={"model_type": "none"}, pickles=True)
    assert torch.equal(columns.tensors["w"].load(), torch.arange(30.0).reshape(5, 6)) and torch.equal(columns.tensors["same"].load(), torch.ones(3))


def test_dcp_that_is_not_whole(written, tmp_path):
    shutil.copytree(written / "columns", tmp_path / "columns")
    options = {"config": {"model_type": "none"}, "pickles": True}
    (tmp_path / "columns" / "__1_0.distcp").unlink()
    with pytest.raises(NotFoundError, match=r"__1_0\.distcp is missing"):
        import_(tmp_path / "columns", tmp_path / "out", **options)
    (tmp_path / "columns" / "__1_0.distcp").write_bytes(b"x" * 4000)
    with pytest.raises((DamagedError, InputError)):
        import_(tmp_path / "columns", tmp_path / "out", **options)
    metadata = (tmp_path / "columns" / ".metadata").read_bytes()
    for damaged in (metadata[: len(metadata) // 2], b"\x80\x04\x93.", b"nonsense", b""):
        (tmp_path / "columns" / ".metadata").write_bytes(damaged)
        with pytest.raises(DamagedError, match=r"\.metadata is not a whole pickle"):
            import_(tmp_path / "columns", tmp_path / "out", **options)
    (tmp_path / "columns" / ".metadata").unlink()
    with pytest.raises(NotFoundError, match="the save was not finished"):
        import_(tmp_path / "columns", tmp_path / "out", layout="dcp", **options)
    assert not (tmp_path / "out").exists()


def test_code_in_dcps_metadata_never_runs(tmp_path, capsys):
    import pickle

    class Bomb:
        def __reduce__(self):
            return print, ("boom",)

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match="reading that could run code"):
        import_(tmp_path / "in", tmp_path / "out", config={"model_type": "none"}, pickles=True)
    assert "boom" not in capsys.readouterr().out


def test_torch_loads_what_is_exported_and_it_comes_back(small_run, tmp_path):
    import torch.distributed.checkpoint as dcp

    source = small_run.newest()
    export_dcp(source, tmp_path / "dcp", optimizer=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp"]
    wanted = {"model": {name: torch.zeros(lazy.shape) for name, lazy in source.tensors.items()}}
    wanted["optimizer"] = {"state": {name: {"exp_avg": torch.zeros(lazy.shape)} for name, lazy in source.tensors.items()}}
    dcp.load(wanted, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert all(torch.equal(wanted["model"][name], lazy.load()) for name, lazy in source.tensors.items())
    assert all(torch.equal(held["exp_avg"], source.optimizer[f"{name}/exp_avg"].load()) for name, held in wanted["optimizer"]["state"].items())

    back = import_(tmp_path / "dcp", tmp_path / "back", pickles=True)
    assert back.model_digest == source.model_digest and back.tokenizer.digest == source.tokenizer.digest
    assert {name: lazy.load().tolist() for name, lazy in back.optimizer.items()} == {name: lazy.load().tolist() for name, lazy in source.optimizer.items()}


def test_an_export_is_never_written_over_something(small_run, tmp_path):
    (tmp_path / "dcp").mkdir()
    with pytest.raises(InputError, match="exists; an export is never written over something"):
        export_dcp(small_run.newest(), tmp_path / "dcp")
    weights = export_dcp(small_run.newest(), tmp_path / "half", dtype="bfloat16")
    assert weights["optimizer"] is False
    halves = import_(tmp_path / "half", tmp_path / "out", pickles=True)
    assert halves.optimizer is None and {lazy.dtype for lazy in halves.tensors.values()} == {torch.bfloat16}
    with pytest.raises(InputError, match="holds no optimizer state"):
        export_dcp(halves, tmp_path / "more", optimizer=True)
