"""Averages and weighted sums against their formulas, on real checkpoints and on plain transformers directories."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cairn.checkpoint.format import read
from cairn.errors import InputError, MismatchError, NotFoundError
from cairn.merging.combine import average, merge
from cairn.merging.methods.average import mean
from cairn.merging.methods.linear import weighted_sum


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=5))
def test_a_weighted_sum_is_numpys(weights):
    inputs = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(len(weights))]
    expected = sum(w * x.double().numpy() for w, x in zip(weights, inputs, strict=True))
    assert np.allclose(weighted_sum(inputs, weights).numpy(), expected, atol=1e-5)
    assert np.allclose(mean(inputs).numpy(), np.mean([x.numpy() for x in inputs], axis=0), atol=1e-6)


def test_an_average_of_a_run_equals_torchs_own(small_run, tmp_path):
    from torch.optim.swa_utils import AveragedModel

    result = average([small_run.path], tmp_path / "mean", last=3)
    models = [read.open(path).model() for path in small_run.checkpoints()[-3:]]
    reference = AveragedModel(models[0])
    for model in models:
        reference.update_parameters(model)
    for name, parameter in reference.module.named_parameters():
        assert torch.allclose(result.tensors[name].load(), parameter, atol=1e-7)
    assert [parent.step for parent in result.lineage.parents] == [10, 15, 20] and result.trainer is None


def test_a_mean_of_many_is_summed_in_float64():
    inputs = [torch.full((500,), 0.1) + 1e-3 * torch.randn(500, generator=torch.Generator().manual_seed(k)) for k in range(1000)]
    exact = np.mean([x.double().numpy() for x in inputs], axis=0)
    assert np.abs(mean(inputs).double().numpy() - exact).max() < 1e-15
    assert mean(inputs[:100]).dtype == torch.float32 and np.abs(sum(inputs).double().numpy() / 1000 - exact).max() > 1e-8


def test_weights_are_normalised_unless_told_otherwise(small_run, tmp_path):
    one, two = small_run.checkpoints()[:2]
    a, b = (read.open(path).tensors["lm_head.weight"].load() for path in (one, two))
    normal = merge("linear", [one, two], tmp_path / "n", {"weights": [1, 3]})
    plain = merge("linear", [one, two], tmp_path / "p", {"weights": [1, -1], "normalize": False})
    assert torch.allclose(normal.tensors["lm_head.weight"].load(), (a + 3 * b) / 4, atol=1e-7)
    assert torch.allclose(plain.tensors["lm_head.weight"].load(), a - b, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"weights": [1]}, "one per checkpoint"), ({"weights": [1, -1]}, "sum to zero"), ({"weight": [1, 2]}, "Did you mean 'weights'")],
)
def test_bad_options_are_refused_before_anything_is_written(small_run, tmp_path, options, sentence):
    with pytest.raises(InputError, match=sentence):
        merge("linear", small_run.checkpoints()[:2], tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []


def test_what_can_not_be_averaged_says_why(small_run, tmp_path):
    with pytest.raises(InputError, match="has 4 complete checkpoints"):
        average([small_run.path], tmp_path / "x", last=9)
    with pytest.raises(NotFoundError, match="Did you mean 'linear'"):
        merge("liner", small_run.checkpoints()[:2], tmp_path / "x")


def test_other_families_shapes_and_tokenizers_are_refused(small_run, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    from cairn.checkpoint.saving import write
    from cairn.data.text.tokenizer import train_bpe

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(MismatchError, match="different families: llama and gpt2"):
        average([small_run.path, tmp_path / "gpt2"], tmp_path / "x")
    newest = small_run.newest()
    same = {"config": newest.config, "lineage": newest.lineage}
    write.save(tmp_path / "tok", model=newest.tensors.load(), tokenizer=train_bpe(["a b c"] * 9, 257), **same)
    with pytest.raises(MismatchError, match="different tokenizers"):
        average([newest, tmp_path / "tok"], tmp_path / "x")
    tensors = newest.tensors.load()
    write.save(tmp_path / "shape", model=tensors | {"model.norm.weight": torch.ones(31)}, **same)
    with pytest.raises(MismatchError, match=r"different shapes: 'model\.norm\.weight'"):
        average([newest, tmp_path / "shape"], tmp_path / "x")
    del tensors["model.norm.weight"]
    write.save(tmp_path / "lack", model=tensors, **same)
    with pytest.raises(MismatchError, match=r"only .* has 'model\.norm\.weight'"):
        average([newest, tmp_path / "lack"], tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_integer_tensors_are_carried_over_or_refused(tmp_path):
    from cairn.checkpoint.format.lineage import Lineage
    from cairn.checkpoint.saving import write

    def made(name, value):
        tensors = {"w": torch.full((3,), float(value)), "ids": torch.tensor([value // 2])}
        return write.save(tmp_path / name, model=tensors, config={"model_type": "x"}, lineage=Lineage(kind="run", name="train"))

    result = average([made("a", 2), made("b", 3)], tmp_path / "ok")
    assert result.tensors["ids"].load().tolist() == [1] and result.tensors["w"].load().tolist() == [2.5] * 3
    with pytest.raises(MismatchError, match="'ids'"):
        average([made("c", 2), made("d", 6)], tmp_path / "no")
    assert not (tmp_path / "no").exists() and not list(tmp_path.glob(".writing*"))
