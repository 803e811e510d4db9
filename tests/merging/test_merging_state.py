"""What averages do beside weights: BatchNorm statistics and the optimizer's moments."""

import numpy as np
import pytest
import torch
from torch import nn

from cairn.checkpoint.format import read, verify
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.operating.walk import PIECE_ITEMS
from cairn.checkpoint.saving import write
from cairn.checkpoint.saving.modules import module_tensors
from cairn.cli.main import main
from cairn.errors import InputError, MismatchError
from cairn.merging.batch_norm import reestimated
from cairn.merging.combine import average, merge
from cairn.registry.replay import replay
from cairn.training.run import fork, train
from tests.merging.merge_drawing import drawn, saved


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


def test_an_average_of_equals_is_that_checkpoint_however_far_its_means_lie_from_zero(tmp_path):
    far = {"norm.running_mean": torch.rand(999) * 1e4, "norm.running_var": torch.rand(999) * 1e-3, "norm.num_batches_tracked": torch.tensor(7)}
    member = saved(tmp_path / "far", far)
    assert average([member] * 4, tmp_path / "mean").digest == member.digest


def test_statistics_may_be_the_last_checkpoints(tmp_path):
    members = [with_statistics(tmp_path / str(seed), seed, 1) for seed in range(3)]
    result = average(members, tmp_path / "last", options={"batch_norm": "last"}).tensors
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(result[f"norm.{key}"].load(), members[-1].tensors[f"norm.{key}"].load())


def test_a_head_that_is_the_first_checkpoints_keeps_its_statistics_and_moments(small_run, tmp_path):
    members = [with_statistics(tmp_path / str(seed), seed, 1) for seed in range(2)]
    result = merge("average", members, tmp_path / "norm", {"heads": "first", "head": ["norm.*"]}).tensors
    for key in ("weight", "running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(result[f"norm.{key}"].load(), members[0].tensors[f"norm.{key}"].load())
    first, last = (read.open(path) for path in small_run.checkpoints()[-2:])
    both = average([first, last], tmp_path / "moments", options={"heads": "first", "moments": "averaged"}).optimizer
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(both[f"lm_head.weight/{key}"].load(), first.optimizer[f"lm_head.weight/{key}"].load())
        assert not torch.equal(both[f"model.norm.weight/{key}"].load(), first.optimizer[f"model.norm.weight/{key}"].load())


def test_statistics_of_many_features_pass_in_pieces(tmp_path):
    def statistics(seed):
        drawn = torch.rand((2, PIECE_ITEMS + 11), generator=torch.Generator().manual_seed(seed))
        return {"running_mean": 9 * drawn[0], "running_var": drawn[1]}

    members = [saved(tmp_path / str(seed), statistics(seed)) for seed in range(2)]
    means, variances = ([member.tensors[key].load().double() for member in members] for key in ("running_mean", "running_var"))
    expected = (variances[0] + means[0] ** 2 + variances[1] + means[1] ** 2) / 2 - ((means[0] + means[1]) / 2) ** 2
    assert torch.allclose(average(members, tmp_path / "mean").tensors["running_var"].load().double(), expected, rtol=1e-6)


def test_models_with_layer_norm_alone_are_none_of_its_business(tmp_path):
    members = []
    for seed in range(3):
        torch.manual_seed(seed)
        members.append(saved(tmp_path / str(seed), nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)).state_dict()))
    results = [average(members, tmp_path / choice, options={"batch_norm": choice}) for choice in ("pooled", "last", "averaged")]
    assert len({result.digest for result in results}) == 1
    assert torch.allclose(results[0].tensors["0.weight"].load(), sum(member.tensors["0.weight"].load() for member in members) / 3, atol=1e-7)


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


class Deep(nn.Module):
    """Two BatchNorms behind one another and a tied weight; the second sees what the first makes of its batch."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6, momentum=0.3), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(self.second(torch.relu(self.norm(self.first(x)))))


def test_reestimation_keeps_all_else_as_it_was_stored(tmp_path):
    torch.manual_seed(3)
    model = Deep()
    stored = {name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor for name, tensor in module_tensors(model).items()}
    moments = {f"{name}/exp_avg": torch.rand_like(tensor) for name, tensor in model.named_parameters()}
    lineage = Lineage(kind="run", name="train", options={"recipe": {"seed": 1}})
    files = {"config": {"model_type": "drawn"}, "optimizer": moments, "ingredients": {"ema/w": torch.ones(3)}, "trainer": {"step": 2, "tokens": 9}}
    checkpoint = write.save(tmp_path / "a", model=stored, lineage=lineage, **files)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9)  # the weights come from the checkpoint
    batches = [data(seed).float() for seed in range(3)]
    model.eval()
    result = reestimated(checkpoint.path, model, iter(batches), tmp_path / "b")
    assert not model.training and model.norm.momentum == 0.3
    assert {name: tensor.spec for name, tensor in result.tensors.items()} == {name: tensor.spec for name, tensor in checkpoint.tensors.items()}
    values, found = {name: tensor.double().numpy() for name, tensor in stored.items()}, []
    for batch in batches:
        x = batch.double().numpy() @ values["first.weight"].T + values["first.bias"]
        x = np.maximum((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * values["norm.weight"] + values["norm.bias"], 0)
        x = x @ values["first.weight"].T + values["second.bias"]
        found.append((x.mean(0), x.var(0, ddof=1)))
    for key, expected in zip(("running_mean", "running_var"), np.mean(found, axis=0), strict=True):
        assert np.allclose(getattr(model.last, key), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(result.tensors[f"last.{key}"].load(), getattr(model.last, key).to(torch.bfloat16))
    made = {name for name in stored if name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")}
    assert len(made) == 6 and all(torch.equal(result.tensors[name].load(), stored[name]) for name in set(stored) - made)
    assert int(result.tensors["norm.num_batches_tracked"].load()) == 3
    assert {name: tensor.load().tolist() for name, tensor in result.optimizer.items()} == {name: tensor.tolist() for name, tensor in moments.items()}
    assert result.ingredients["ema/w"].load().tolist() == [1] * 3 and result.trainer == files["trainer"] and verify.verify(result.path).sound
    assert result.lineage.options == {"batches": 3, "recipe": {"seed": 1}} and result.lineage.changed == ["BatchNorm statistics: kept -> of 3 batches"]


def test_statistics_of_instances_are_none_of_its_business(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True))
    checkpoint = saved(tmp_path / "a", model.state_dict())
    result = reestimated(checkpoint, model, [torch.randn(8, 4, 5, generator=torch.Generator().manual_seed(0))], tmp_path / "b").tensors
    assert not torch.equal(result["0.running_mean"].load(), checkpoint.tensors["0.running_mean"].load())
    assert torch.equal(result["1.running_mean"].load(), checkpoint.tensors["1.running_mean"].load())


def test_what_can_not_be_reestimated_says_why(tmp_path):
    mean = average([with_statistics(tmp_path / "a", 0, 1)] * 2, tmp_path / "mean")
    with pytest.raises(InputError, match="keeps no BatchNorm statistics"):
        reestimated(mean, nn.Linear(6, 5), [data(1)], tmp_path / "x")
    with pytest.raises(InputError, match="No batches"):
        reestimated(mean, Network().double(), [], tmp_path / "x")
    with pytest.raises(MismatchError, match="do not fit this model"):
        reestimated(mean, nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), [data(1)], tmp_path / "x")
    with pytest.raises(InputError, match="exists"):
        reestimated(mean, Network().double(), iter(()), mean.path)
    model = Network().double().eval()
    with pytest.raises(InputError, match="Batch 2 has no statistics"):
        reestimated(mean, model, [data(1), data(2, rows=1)], tmp_path / "x")
    assert not model.training and model.norm.momentum == 0.1
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


def test_the_command_line_goes_on_from_an_average(small_run, corpus_file, tmp_path, monkeypatch):
    def cairn(*arguments):
        monkeypatch.setattr("sys.argv", ["cairn", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0

    out, begun = tmp_path / "mean", small_run.newest().step
    assert cairn("average", small_run.path, "--last", 2, "--moments", "averaged", "--batch-norm", "last", "-o", out) == 0
    assert read.open(out).lineage.options["batch_norm"] == "last" and cairn("verify", out) == 0
    assert cairn("fork", out, f"training.tokens={begun + 2} steps", "--run", tmp_path / "fork") == 0
    assert cairn("continue", out, "--data", f"new={corpus_file}", "--tokens", "2 steps", "--run", tmp_path / "on") == 0
    for name in ("fork", "on"):
        assert read.open(tmp_path / name).step == begun + 2 and read.open(tmp_path / name).optimizer is not None


def test_what_events_keep_goes_on_too(small_recipe, small_run, tmp_path):
    smoothed = {**small_recipe, "callbacks": [{"name": "ema", "decay": 0.9}], "training": {**small_recipe["training"], "tokens": "10 steps"}}
    start = read.open(train(smoothed, tmp_path / "run").path)
    result = average([start] * 2, tmp_path / "mean", options={"moments": "averaged"})
    assert result.digest == start.digest and result.trainer["callbacks"] and set(result.ingredients) == set(start.ingredients)
    ours, theirs = (fork(source, tmp_path / name, ["training.tokens=12 steps"]).newest() for name, source in (("ours", result), ("theirs", start)))
    assert ours.digest == theirs.digest


def test_replay_makes_an_average_with_moments_again(small_run, tmp_path):
    result = average(small_run.checkpoints()[-2:], tmp_path / "mean", options={"moments": "averaged"})
    again = replay(result, store=False)
    assert again.outcome == "bitwise" and again.remarks == []


def test_factored_moments_are_averaged_and_counters_of_any_kind_are_the_last_ones(tmp_path):
    members = []
    for seed in range(2):
        state = {
            "w/row": torch.full((4,), 1.0 + seed),
            "w/step": torch.tensor(5.0 + seed),
            "w/product": torch.tensor(5.0 + seed),
            "b/step": torch.tensor(5.0 + seed),
            "b/mean": torch.tensor(float(seed)),
        }
        weights = {"w": torch.ones(4, 3), "b": torch.tensor(1.0)}
        members.append(write.save(tmp_path / str(seed), model=weights, config={"model_type": "x"}, optimizer=state, lineage=Lineage(kind="run", name="train")))
    found = average(members, tmp_path / "mean", options={"moments": "averaged"}).optimizer
    assert {name: tensor.load().tolist() for name, tensor in found.items()} == {
        "w/row": [1.5] * 4,
        "w/step": 6.0,
        "w/product": 6.0,
        "b/step": 6.0,
        "b/mean": 0.5,
    }


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
