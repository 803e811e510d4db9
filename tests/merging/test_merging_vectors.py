"""Methods on task vectors against formulas written out anew, against closed forms, and against mergekit where it is installed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cairn.checkpoint.operating import stream
from cairn.errors import InputError, MismatchError
from cairn.merging.combine import merge
from cairn.merging.methods.dare import Dare, drop
from cairn.merging.methods.model_stock import ModelStock, ratio
from cairn.merging.methods.slerp import Slerp, arc
from cairn.merging.methods.task_arithmetic import TaskArithmetic
from cairn.merging.methods.ties import Ties, disjoint, trim
from tests.merging.merge_drawing import drawn, family, saved, vectors, whole


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    return family(tmp_path_factory.mktemp("family"))


def ties_in_numpy(tau, density, mean, scale):
    kept = np.zeros_like(tau)
    for row, out in zip(tau, kept, strict=True):
        largest = np.argsort(-np.abs(row), kind="stable")[: max(1, int(density * len(row)))]
        out[largest] = row[largest]
    sign = np.where(kept.sum(0) >= 0, 1, -1)
    agree = np.sign(kept) == sign
    total, count = (kept * agree).sum(0), agree.sum(0)
    return scale * (total / np.maximum(count, 1) if mean else total)


def test_task_arithmetic_is_base_plus_scaled_sum_and_knows_one_expert(members, tmp_path):
    result = merge("task-arithmetic", members[1:], tmp_path / "a", {"scale": 0.4, "weights": [1, 2, -1]}, base=members[0])
    tau = vectors(members)
    assert torch.allclose(whole(result), whole(members[0]) + 0.4 * (tau[0] + 2 * tau[1] - tau[2]), atol=1e-6)
    alone = merge("task-arithmetic", members[1:2], tmp_path / "b", base=members[0])
    assert torch.allclose(whole(alone), whole(members[1]), atol=1e-6)
    assert [parent.digest for parent in result.lineage.parents] == [member.digest for member in members]
    assert result.lineage.options["weights"] == [1, 2, -1] and result.lineage.options["scale"] == 0.4


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_numpys_within_tensors_and_over_the_model(members, tmp_path, density, mean):
    options = {"density": density, "scale": 0.7, "aggregate": "mean" if mean else "sum"}
    inside = merge("ties", members[1:], tmp_path / "t", options, base=members[0])
    for name, tensor in inside.tensors.items():
        expected = members[0].tensors[name].load().reshape(-1).numpy() + ties_in_numpy(vectors(members, name).numpy(), density, mean, 0.7)
        assert np.allclose(tensor.load().reshape(-1).numpy(), expected, atol=1e-6)
    over = merge("ties", members[1:], tmp_path / "m", options | {"scope": "model"}, base=members[0])
    assert np.allclose(whole(over).numpy(), whole(members[0]).numpy() + ties_in_numpy(vectors(members).numpy(), density, mean, 0.7), atol=1e-6)


def test_ties_elects_by_the_sum_and_merges_what_agrees():
    tau = torch.tensor([[3.0, -1.0, 0.0], [-1.0, -2.0, 0.0], [1.0, 5.0, -4.0]])
    assert disjoint(tau, torch.ones(3, 1), True).tolist() == [2.0, 5.0, -4.0]
    assert disjoint(tau, torch.ones(3, 1), False).tolist() == [4.0, 5.0, -4.0]
    assert trim(tau, torch.tensor([2.0, 2.0, 5.0])).tolist() == [[3, 0, 0], [0, -2, 0], [0, 5, 0]]


def test_dare_keeps_the_share_asked_for_and_the_expectation_and_does_not_depend_on_how_tensors_are_cut():
    tau = torch.ones(2, 20_000)
    kept = drop(tau, 0.3, seed=1, name="w", begin=0)
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.3])
    assert kept.mean() == pytest.approx(1.0, abs=0.02) and not torch.equal(kept[0], kept[1])
    pieces = torch.cat([drop(tau[:, :7000], 0.3, 1, "w", 0), drop(tau[:, 7000:], 0.3, 1, "w", 7000)], dim=1)
    assert torch.equal(kept, pieces) and not torch.equal(kept, drop(tau, 0.3, seed=2, name="w", begin=0))


def test_dare_that_drops_nothing_is_task_arithmetic_or_ties(members, tmp_path):
    results = [
        stream.apply(operation, members, tmp_path / str(number))
        for number, operation in enumerate([Dare(density=1, scale=0.5), TaskArithmetic(scale=0.5), Dare(density=1, elect="mean"), Ties(density=1)])
    ]
    assert torch.equal(whole(results[0]), whole(results[1])) and torch.equal(whole(results[2]), whole(results[3]))


@given(st.floats(0.05, 0.95), st.floats(0.1, 3.0))
def test_slerp_stays_on_the_circle(t, angle):
    first, second = arc(t, np.cos(angle))
    a, b = np.array([1.0, 0.0]), np.array([np.cos(angle), np.sin(angle)])
    point = first * a + second * b
    assert np.allclose(point, [np.cos(t * angle), np.sin(t * angle)], atol=1e-9)


def test_slerp_ends_at_its_ends_and_is_linear_on_a_line(members, tmp_path):
    pair = members[:2]
    ends = [stream.apply(Slerp(t=t), pair, tmp_path / str(t)) for t in (0.0, 1.0)]
    assert torch.allclose(whole(ends[0]), whole(pair[0]), atol=1e-6) and torch.allclose(whole(ends[1]), whole(pair[1]), atol=1e-6)
    twice = saved(tmp_path / "twice", {name: 2 * tensor.load() for name, tensor in pair[0].tensors.items()})
    assert torch.allclose(whole(stream.apply(Slerp(t=0.25), [pair[0], twice], tmp_path / "line")), 1.25 * whole(pair[0]), atol=1e-6)
    with pytest.raises(InputError, match="between two checkpoints, and 3"):
        stream.apply(Slerp(), members[:3], tmp_path / "x")


def test_model_stock_goes_all_the_way_for_equal_experts_and_nowhere_for_orthogonal_ones(members, tmp_path):
    assert ratio(torch.full((3, 3), 4.0)) == pytest.approx(1.0) and ratio(torch.eye(3)) == 0.0
    assert ratio(torch.tensor([[1.0, 0.5], [0.5, 1.0]])) == pytest.approx(2 * 0.5 / 1.5)
    base, one = members[0], members[1]
    copy = saved(tmp_path / "copy", one.tensors.load())
    assert torch.allclose(whole(stream.apply(ModelStock(), [base, one, copy], tmp_path / "same")), whole(one), atol=1e-6)


def test_coefficients_by_pattern(members, tmp_path):
    options = {"scale": {"*.mlp.*": 1.0, "lm_head.*": 0.0, "*": 0.5}}
    result = merge("task-arithmetic", members[1:], tmp_path / "a", options, base=members[0])
    for name, scale in (("model.b.mlp.weight", 1.0), ("lm_head.weight", 0.0), ("model.a.weight", 0.5)):
        expected = members[0].tensors[name].load().reshape(-1) + scale * vectors(members, name).sum(0)
        assert torch.allclose(result.tensors[name].load().reshape(-1), expected, atol=1e-6)
    weights = {"lm_head.*": [1, 0], "*": [1, 1]}
    mixed = merge("linear", members[:2], tmp_path / "b", {"weights": weights})
    assert torch.equal(mixed.tensors["lm_head.weight"].load(), members[0].tensors["lm_head.weight"].load())


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        ("task-arithmetic", {"scale": {"*.mlp.*": 1.0}}, "no pattern matches the tensor"),
        ("task-arithmetic", {"scale": {"*": 1.0, "*.mlp.*": 2.0}}, r"'\*\.mlp\.\*' decides for no tensor"),
        ("ties", {"weights": [1.0]}, "has 1 values and 3 experts"),
        ("ties", {"density": 0}, "density"),
        ("consensus", {"thresholds": [0.1]}, "1 values for 3 experts"),
        ("tall-masks", {"names": ["a", "a", "b"]}, "all different"),
    ],
)
def test_bad_options_are_refused_in_one_sentence_before_anything_is_written(members, tmp_path, method, options, sentence):
    with pytest.raises(InputError, match=sentence):
        merge(method, members[1:], tmp_path / "out", options, base=members[0])
    assert list(tmp_path.iterdir()) == []


def test_the_base_is_asked_for_and_refused_where_it_has_no_use(members, tmp_path):
    with pytest.raises(InputError, match="name that with --base"):
        merge("ties", members[1:], tmp_path / "x")
    with pytest.raises(InputError, match="linear knows no base"):
        merge("linear", members[1:], tmp_path / "x", base=members[0])
    with pytest.raises(MismatchError, match="as base and as expert"):
        merge("ties", members, tmp_path / "x", base=members[0])
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_is_computed_in_float32_and_written_as_bfloat16(tmp_path):
    base, change = drawn(0), drawn(1, spread=2**-6)
    base = {name: tensor.bfloat16() for name, tensor in base.items()}
    experts = [{name: (base[name].float() + k * change[name]).bfloat16() for name in base} for k in (1, 2)]
    members = [saved(tmp_path / str(number), tensors) for number, tensors in enumerate([base, *experts])]
    result = merge("task-arithmetic", members[1:], tmp_path / "out", {"scale": 0.3}, base=members[0])
    for name in base:
        exact = base[name].float() + 0.3 * sum(expert[name].float() - base[name].float() for expert in experts)
        assert torch.equal(result.tensors[name].load(), exact.bfloat16())


def test_values_that_are_not_finite_are_named(tmp_path):
    tensors = drawn(1)
    tensors["model.a.weight"][0, 0] = float("nan")
    members = [saved(tmp_path / "base", drawn(0)), saved(tmp_path / "nan", tensors)]
    with pytest.raises(InputError, match="not finite"):
        merge("ties", members[1:], tmp_path / "out", {"density": 0.5}, base=members[0])
    assert not (tmp_path / "out").exists()


class TestMergekit:
    """The same state dicts through mergekit's own functions."""

    @pytest.fixture(autouse=True)
    def mergekit(self):
        pytest.importorskip("mergekit")

    @pytest.mark.parametrize("density", [0.3, 1.0])
    def test_ties(self, members, tmp_path, density):
        from mergekit.merge_methods.generalized_task_arithmetic import ConsensusMethod, get_mask
        from mergekit.sparsify import SparsificationMethod, sparsify

        result = merge("ties", members[1:], tmp_path / "out", {"density": density, "weights": [1.0, 0.5, 2.0]}, base=members[0])
        for name, tensor in result.tensors.items():
            weights = torch.tensor([[1.0], [0.5], [2.0]])
            deltas = torch.stack([sparsify(row, density, SparsificationMethod.magnitude) for row in vectors(members, name)]) * weights
            mask = get_mask(deltas, ConsensusMethod.sum.value, mask_dtype=torch.float32)
            divisor = (weights * mask).sum(0)
            divisor[divisor == 0] = 1
            expected = members[0].tensors[name].load().reshape(-1) + (deltas * mask).sum(0) / divisor
            assert (tensor.load().reshape(-1) - expected).abs().max() < 1e-6

    def test_slerp(self, members, tmp_path):
        from mergekit.merge_methods.slerp import slerp

        result = stream.apply(Slerp(t=0.3), members[:2], tmp_path / "out")
        for name, tensor in result.tensors.items():
            a, b = (member.tensors[name].load()[None] for member in members[:2])
            assert (tensor.load() - slerp(torch.tensor([0.3]), a, b)[0]).abs().max() < 1e-6

    def test_model_stock(self, members, tmp_path):
        from mergekit.merge_methods.model_stock import model_stock_merge_method

        result = stream.apply(ModelStock(), members, tmp_path / "out")
        for name, tensor in result.tensors.items():
            base, *experts = (member.tensors[name].load() for member in members)
            group = type("Group", (), {"base": type("E", (), {"tensor": base}), "non_base": [type("E", (), {"tensor": e}) for e in experts]})
            assert (tensor.load() - model_stock_merge_method.implementation(group)).abs().max() < 1e-6
