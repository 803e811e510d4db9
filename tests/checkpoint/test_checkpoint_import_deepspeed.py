"""Beside DeepSpeed itself, where it is installed: real ZeRO folders, its two converters and ours, tensor by tensor."""

import os
import subprocess
import sys

import pytest
import torch

from cairn.checkpoint.foreign.importing import import_
from tests.faults import torchrun

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; pip install deepspeed runs the comparison with its own converters")

WORKER = """
import os, sys, torch, deepspeed
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.a, self.b, self.norm = nn.Embedding(13, 6), nn.Linear(6, 5), nn.Linear(5, 7, bias=False), nn.LayerNorm(7)

    def forward(self, ids):
        return self.norm(self.b(torch.tanh(self.a(self.embed(ids))))).float().pow(2).mean()


deepspeed.init_distributed("gloo")
for stage in (1, 2, 3):
    torch.manual_seed(0)
    optimizer = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}, "bf16": {"enabled": True}, "optimizer": optimizer}
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    with deepspeed.zero.Init(config_dict_or_path=settings, enabled=stage == 3):
        model = Model()
    engine, *_ = deepspeed.initialize(model=model, config=settings, model_parameters=model.parameters())
    for step in range(3):
        engine.backward(engine(torch.randint(0, 13, (2, 4))))
        engine.step()
    engine.save_checkpoint(f"{sys.argv[1]}/zero{stage}", tag="global_step3")
torch.distributed.barrier()
os._exit(0)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    (folder / "worker.py").write_text(WORKER)
    torchrun(2, folder / "worker.py", str(folder))
    return folder


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_our_import_and_deepspeeds_converters_agree_bit_for_bit(stage, folders, tmp_path):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    source = folders / f"zero{stage}"
    ours = import_(source, tmp_path / "ours", config={"model_type": "none"}, pickles=True)
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(source))
    assert set(ours.tensors) == set(theirs) and len(theirs) == 6
    assert all(torch.equal(ours.tensors[name].load(), tensor.contiguous()) for name, tensor in theirs.items())

    arguments = ["--input_folder", str(source / "global_step3"), "--output_folder", str(tmp_path / "universal"), "--inject_missing_state"]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *arguments, *workers]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"})
    assert done.returncode == 0, done.stderr
    for name in theirs:
        for key, held in (("fp32", ours.tensors[name]), *((key, ours.optimizer[f"{name}/{key}"]) for key in ("exp_avg", "exp_avg_sq"))):
            atomic = torch.load(tmp_path / "universal" / "zero" / name / f"{key}.pt", weights_only=False)
            atomic = atomic["param"] if isinstance(atomic, dict) else atomic
            assert torch.equal(held.load().reshape(-1), atomic.reshape(-1)), (name, key)
    assert {float(lazy.load()) for name, lazy in ours.optimizer.items() if name.endswith("/step")} == {3.0}
