"""Activation statistics against plain hooks on transformers' own model, and against the same model in memory."""

import numpy as np
import pytest
import torch

from cairn.checkpoint.format import read
from cairn.data.text.calibration import Calibration
from cairn.evaluation import measure
from cairn.evaluation.measurements import activation_statistics as room
from cairn.options import configure
from tests.compression.test_compression_wanda import model_of


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "set.safetensors"
    Calibration(np.random.default_rng(0).integers(0, 97, (6, 16)), {"corpus": "drawn"}).save(path)
    return path


@pytest.mark.parametrize("family", ["gpt_neox", "qwen2"])
def test_every_figure_is_what_plain_hooks_give(family, texts, tmp_path):
    from scipy.stats import kurtosis
    from transformers import AutoModelForCausalLM

    path = model_of(family, tmp_path / "m")
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 97, (6, 16)))
    found = room.of_checkpoint(read.open(path), ids, tmp_path / "work", micro_batch=4, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    seen = {}
    for name in found:
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0].double()}))
    with torch.no_grad():
        model(ids)
    assert len(found) == (4 * 3 if family == "gpt_neox" else 7 * 3) and not (tmp_path / "work").exists()
    for name, inputs in seen.items():
        each = found[name]
        assert each.kurtosis() == pytest.approx(kurtosis(inputs.flatten().numpy()), rel=1e-6, abs=1e-6)
        assert each.kurtosis(2) == pytest.approx(kurtosis(inputs[2].flatten().numpy()), rel=1e-6, abs=1e-6)
        assert torch.allclose(each.channel_max, inputs.abs().amax((0, 1))) and torch.allclose(each.channel_squares, inputs.square().mean((0, 1)))
        assert float(each.above.sum()) == float((inputs.abs() > 6).sum())


def test_an_outlier_channel_is_found_and_counted(texts, tmp_path):
    path = model_of("llama", tmp_path / "m")
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][7] *= 400
    for part in "qkv":
        tensors[f"model.layers.1.self_attn.{part}_proj.weight"][:, 7] /= 400
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 97, (6, 16)))
    found = room.of_checkpoint(read.open(path), ids, tmp_path / "work")
    assert found["model.layers.1.self_attn.q_proj.weight"].outlier_channels() == [7]
    assert found["model.layers.0.self_attn.q_proj.weight"].outlier_channels() == []
    task = {"name": "activation-statistics", "calibration": str(texts), "sequences": 6, "blocks": True}
    rows = {(row.task, row.metric): row for row in measure.evaluate(path, [task], store=False)}
    assert rows["activation-statistics block 1", "outlier_channels"].value > 0 == rows["activation-statistics block 0", "outlier_channels"].value
    assert rows["activation-statistics block 1", "kurtosis"].value > rows["activation-statistics block 0", "kurtosis"].value + 3


def test_the_model_in_memory_has_the_same_figures(texts, tmp_path):
    opened = read.open(model_of("llama", tmp_path / "m"))
    method = configure("measurement", {"name": "activation-statistics", "calibration": str(texts), "sequences": 6})
    one, other = method.of_checkpoint(opened, "cpu"), method.of(opened.model(), opened.tokenizer)
    assert [(score.task, score.metric, score.n) for score in one] == [(score.task, score.metric, score.n) for score in other]
    assert [score.value for score in one] == pytest.approx([score.value for score in other], rel=1e-5)
    assert [score.stderr for score in one] == pytest.approx([score.stderr for score in other], rel=1e-4, abs=1e-9)
