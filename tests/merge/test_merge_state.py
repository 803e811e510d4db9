"""What averages do beside weights: BatchNorm statistics and the optimizer's moments."""

import numpy as np
import pytest
import torch
from torch import nn

from cairn.checkpoint import read, verify, write
from cairn.checkpoint.lineage import Lineage
from cairn.errors import InputError, MismatchError
from cairn.merge.batch_norm import reestimated
from cairn.merge.combine import average, merge
from cairn.train.run import fork
from tests.merge.merge_drawing import drawn, saved


class Network(nn.Module):
    def __init__(self, dimensions=1):
        super().__init__()
        self.first = nn.Linear(6, 5) if dimensions == 1 else nn.Conv2d(6, 5, 1)
        self.norm = nn.BatchNorm1d(5) if dimensions == 1 else nn.BatchNorm2d(5)

    def forward(self, x):
        return self.norm(self.first(x))


def data(seed, dimensions=1, rows=64):
    shape = (rows, 6) if dimensions == 1 else (rows, 6, 3, 3)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * (1 + seed) + 5 * seed


def with_statistics(path, seed, dimensions):
    """A network with weights of seed 0 whose statistics are exactly those of all its data, biased as pooling has them."""
    torch.manual_seed(0)
    model = Network(dimensions).double()
    inner = model.first(data(seed, dimensions)).detach()
    axes = [0] if dimensions == 1 else [0, 2, 3]
    model.norm.running_mean.copy_(inner.mean(axes))
    model.norm.running_var.copy_(inner.var(axes, unbiased=False))
    model.norm.num_batches_tracked.fill_(3 + seed)
    return saved(path, model.state_dict())


@pytest.mark.parametrize("dimensions", [1, 2])
def test_pooled_statistics_are_those_of_all_the_data(tmp_path, dimensions):
    members = [with_statistics(tmp_path / str(seed), seed, dimensions) for seed in range(3)]
    torch.manual_seed(0)
    inner = Network(dimensions).double().first(torch.cat([data(seed, dimensions) for seed in range(3)])).detach()
    axes = [0] if dimensions == 1 else [0, 2, 3]
    result = average(members, tmp_path / "mean").tensors
    assert torch.allclose(result["norm.running_mean"].load(), inner.mean(axes), rtol=0, atol=1e-12)
    assert torch.allclose(result["norm.running_var"].load(), inner.var(axes, unbiased=False), rtol=1e-12, atol=0)
    assert int(result["norm.num_batches_tracked"].load()) == 5  # the last checkpoint's
    plain = average(members, tmp_path / "plain", options={"batch_norm": "averaged"}).tensors["norm.running_var"].load()
    assert torch.allclose(plain, sum(member.tensors["norm.running_var"].load() for member in members) / 3)
    assert (plain < 0.9 * inner.var(axes, unbiased=False)).all()  # what is lost by averaging variances


def test_an_exponential_average_pools_with_its_weights(tmp_path):
    members = [with_statistics(tmp_path / str(seed), seed, 1) for seed in range(2)]
    means, variances = ([m.tensors[f"norm.running_{key}"].load() for m in members] for key in ("mean", "var"))
    result = average(members, tmp_path / "ema", method="ema", options={"beta": 0.75}).tensors["norm.running_var"].load()
    second = 0.75 * (variances[0] + means[0] ** 2) + 0.25 * (variances[1] + means[1] ** 2)
    assert torch.allclose(result, second - (0.75 * means[0] + 0.25 * means[1]) ** 2, rtol=1e-12)


def test_statistics_never_become_negative_and_a_lone_variance_is_a_weight(tmp_path):
    constant = {"norm.running_mean": torch.rand(999, dtype=torch.float64) * 1e4, "norm.running_var": torch.zeros(999, dtype=torch.float64)}
    members = [saved(tmp_path / str(k), constant) for k in range(3)]
    variance = average(members, tmp_path / "mean").tensors["norm.running_var"].load()
    assert (variance >= 0).all() and variance.max() < 1e-7
    lone = [saved(tmp_path / f"lone-{k}", {"norm.running_var": torch.full((4,), float(k))}) for k in range(2)]
    assert torch.equal(average(lone, tmp_path / "lone").tensors["norm.running_var"].load(), torch.full((4,), 0.5))


def test_reestimated_statistics_are_those_of_one_pass(tmp_path):
    members = [with_statistics(tmp_path / str(seed), seed, 1) for seed in range(2)]
    mean, model = average(members, tmp_path / "mean"), Network().double()
    batches = [data(7, rows=32), data(8, rows=32), data(9, rows=32)]
    result = reestimated(mean, model, [(batch, None) for batch in batches], tmp_path / "again")
    weight, bias = (mean.tensors[f"first.{key}"].load().numpy() for key in ("weight", "bias"))
    inner = [batch.numpy() @ weight.T + bias for batch in batches]
    assert np.allclose(result.tensors["norm.running_mean"].load(), np.mean([x.mean(0) for x in inner], 0), rtol=0, atol=1e-12)
    assert np.allclose(result.tensors["norm.running_var"].load(), np.mean([x.var(0, ddof=1) for x in inner], 0), rtol=1e-12)
    assert torch.equal(result.tensors["first.weight"].load(), mean.tensors["first.weight"].load())
    assert result.lineage.name == "re-estimate" and result.lineage.parents[0].digest == mean.digest and result.lineage.options == {"batches": 3}
    assert verify.verify(result.path).sound
    whole = reestimated(mean, model, [torch.cat(batches)], tmp_path / "whole").tensors["norm.running_var"].load()
    assert np.allclose(whole, np.concatenate(inner).var(0, ddof=1), rtol=1e-12)  # in one batch: of all the data


def test_what_can_not_be_reestimated_says_why(tmp_path):
    mean = average([with_statistics(tmp_path / "a", 0, 1)] * 2, tmp_path / "mean")
    with pytest.raises(InputError, match="keeps no BatchNorm statistics"):
        reestimated(mean, nn.Linear(6, 5), [data(1)], tmp_path / "x")
    with pytest.raises(InputError, match="No batches"):
        reestimated(mean, Network().double(), [], tmp_path / "x")
    with pytest.raises(MismatchError, match="do not fit this model"):
        reestimated(mean, nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), [data(1)], tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_averaged_moments_are_the_mean_and_training_goes_on_from_them(small_run, tmp_path):
    members = [read.open(path) for path in small_run.checkpoints()[-3:]]
    result = average(members, tmp_path / "mean", options={"moments": "averaged"})
    assert set(result.optimizer) == set(members[0].optimizer) and verify.verify(result.path).sound
    counters = 0
    for name, tensor in result.optimizer.items():
        owner = name.rpartition("/")[0]
        if tensor.shape == result.tensors[owner].shape:
            assert torch.allclose(tensor.load(), sum(m.optimizer[name].load() for m in members) / 3, rtol=1e-6, atol=1e-12), name
        else:
            counters += 1
            assert torch.equal(tensor.load(), members[-1].optimizer[name].load()), name
    assert counters and result.trainer["tokens"] == members[-1].trainer["tokens"]
    assert result.lineage.changed == ["optimizer state: kept -> moments averaged, the rest of the last parent"] and len(result.lineage.parents) == 3
    plain = average(members, tmp_path / "plain")
    assert plain.optimizer is None and plain.trainer is None and "optimizer state: kept -> none" in plain.lineage.changed
    assert plain.model_digest == result.model_digest


def test_the_average_of_equals_goes_on_as_they_do(small_run, tmp_path):
    start = read.open(small_run.checkpoints()[1])
    result = average([start] * 4, tmp_path / "mean", options={"moments": "averaged"})
    assert all(torch.equal(tensor.load(), start.optimizer[name].load()) for name, tensor in result.optimizer.items())
    longer = [f"training.tokens={start.tokens + 4 * 96} tokens", "training.batch=96", "checkpoint.every=100%"]
    ours, theirs = (fork(source, tmp_path / name, longer) for name, source in (("ours", result), ("theirs", start)))
    assert [row["loss"] for row in ours.metrics()] == [row["loss"] for row in theirs.metrics()] and len(ours.metrics()) >= 4
    assert ours.newest().model_digest == theirs.newest().model_digest
    fresh = fork(result, tmp_path / "fresh", longer, fresh=["optimizer"])
    assert [row["loss"] for row in fresh.metrics()] != [row["loss"] for row in ours.metrics()]


def test_moments_that_do_not_fit_are_refused(tmp_path):
    bare = saved(tmp_path / "bare", drawn(0))
    with pytest.raises(InputError, match="holds no optimizer state"):
        merge("average", [bare, bare], tmp_path / "x", {"moments": "averaged"})

    def kept(name, state):
        tensors = drawn(1)
        return write.save(tmp_path / name, model=tensors, config={"model_type": "drawn"}, optimizer=state(tensors), lineage=Lineage(kind="run", name="train"))

    whole = kept("whole", lambda tensors: {f"{name}/exp_avg": tensor for name, tensor in tensors.items()})
    part = kept("part", lambda tensors: {f"{name}/exp_avg": tensor for name, tensor in list(tensors.items())[1:]})
    short = kept("short", lambda tensors: {f"{name}/exp_avg": tensor[:1] for name, tensor in tensors.items()})
    strange = kept("strange", lambda tensors: {"other/exp_avg": torch.ones(2)})
    for others, sentence in [([whole, part], "not the same in both"), ([whole, short], "not the same in both"), ([strange, strange], "does not hold")]:
        with pytest.raises(MismatchError, match=sentence):
            merge("average", others, tmp_path / "x", {"moments": "averaged"})
    assert not (tmp_path / "x").exists()
