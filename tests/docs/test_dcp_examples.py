"""What docs/howto/elsewhere.md and import.md say of torch.distributed.checkpoint, run: tied and untied, with a step beside the weights."""

import re
from pathlib import Path

import pytest
import torch

from cairn.checkpoint.foreign.export import export_dcp
from cairn.checkpoint.foreign.importing import import_
from cairn.checkpoint.format import read
from cairn.checkpoint.saving.dcp import DcpReader
from cairn.errors import MismatchError
from tests.checkpoint.test_checkpoint_operating import directory

DOCS = Path(__file__).parents[2] / "docs/howto"


@pytest.mark.parametrize("tied", [True, False])
def test_the_documented_load_of_an_export_fills_a_model_of_transformers(tied, tmp_path, monkeypatch):
    import torch.distributed.checkpoint as dcp
    from transformers import AutoConfig, AutoModelForCausalLM

    path = directory(tmp_path / "m", tied=tied)
    export_dcp(path, tmp_path / "released-dcp")
    call = re.search(r"`(dcp\.load\(\{\"model\": model\.state_dict\(\)\}, checkpoint_id=\"released-dcp\"\))`", (DOCS / "elsewhere.md").read_text())
    assert call is not None
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    exec(call[1], {"dcp": dcp, "model": model})
    wanted = AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    weights = {name: torch.zeros_like(value) for name, value in wanted.items()}
    dcp.load({"model": weights}, storage_reader=DcpReader(path, prefix="model."))
    assert all(torch.equal(value, wanted[name]) for name, value in weights.items())


@pytest.mark.parametrize("nested", [True, False])
def test_a_step_beside_the_weights_is_a_fact_and_no_weight(nested, tmp_path):
    import torch.distributed.checkpoint as dcp

    path = directory(tmp_path / "m")
    weights = read.open(path).tensors.load()
    state = {"model": weights, "step": torch.tensor(7)} if nested else {**weights, "step": torch.tensor(7)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "dcp"), no_dist=True)
    made = import_(tmp_path / "dcp", tmp_path / "out", config=path, pickles=True)
    assert set(made.tensors) == set(weights) and made.lineage.options["facts"] == {"step": 7}
    assert "left out: step" in made.lineage.changed


def test_a_spec_drops_what_belongs_to_no_model(tmp_path):
    path = directory(tmp_path / "m", change=lambda tensors: {**tensors, "model.layers.0.debug.scale": torch.ones(3)})
    with pytest.raises(MismatchError, match=r"unknown 'model.layers.0.debug.scale'"):
        import_(path, tmp_path / "out")
    (tmp_path / "spec.yaml").write_text("drop: ['.*debug.*']\n")
    made = import_(path, tmp_path / "out", spec=tmp_path / "spec.yaml")
    assert not any("debug" in name for name in made.tensors) and any("dropped by the spec" in line for line in made.lineage.changed)
    (tmp_path / "spec.yaml").write_text("drop: ['nothing.*']\n")
    with pytest.raises(MismatchError, match=r"'nothing.*' of 'drop' matches no tensor"):
        import_(path, tmp_path / "again", spec=tmp_path / "spec.yaml")
