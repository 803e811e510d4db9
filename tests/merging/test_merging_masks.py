"""TALL masks, bundles, consensus and PCB against brute force, closed forms and numpy versions written from the papers' steps."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cairn.checkpoint.format import verify
from cairn.checkpoint.operating import stream
from cairn.errors import InputError, NotFoundError
from cairn.evaluation.measure import Score
from cairn.merging.combine import merge
from cairn.merging.localize import masks, pack, unpack
from cairn.merging.methods import tall_masks
from cairn.merging.methods.consensus import Consensus
from cairn.merging.methods.pcb import EPS, Pcb
from cairn.merging.methods.task_arithmetic import TaskArithmetic
from cairn.merging.methods.ties import Ties
from tests.merging.merge_drawing import drawn, family, saved, vectors, whole


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    return family(tmp_path_factory.mktemp("family"))


def test_a_mask_is_the_best_of_all_masks_in_the_l1_distance():
    tau = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    merged = tau.sum(0)
    found = masks(tau, merged, torch.ones(4))
    off, on = tau.abs(), (merged - tau).abs()
    assert torch.equal(torch.where(found, on, off), torch.minimum(on, off)) and 0.1 < found.float().mean() < 0.9


def test_a_threshold_near_zero_turns_on_what_changed_and_nothing_else():
    tau = torch.tensor([[1.0, 0.0, -2.0, 0.0], [3.0, 4.0, 2.0, 0.0]])
    assert masks(tau, tau.sum(0), torch.full((2,), 1e-12)).tolist() == [[True, False, True, False], [True, True, True, False]]


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_packed_masks_unpack_to_the_same_bits(bits):
    mask = torch.tensor(bits)
    packed = pack(mask)
    assert packed.numel() == math.ceil(len(bits) / 8) and torch.equal(unpack(packed, len(bits)), mask)


def test_experts_that_changed_different_weights_come_back_exactly(tmp_path):
    base = drawn(0)
    experts = []
    for number in range(3):
        change = {name: torch.where(torch.arange(t.numel()).view(t.shape) % 3 == number, torch.ones_like(t), torch.zeros_like(t)) for name, t in base.items()}
        experts.append(saved(tmp_path / f"{number}", {name: base[name] + change[name] for name in base}))
    bundle = tall_masks.bundle(saved(tmp_path / "base", base), {f"e{n}": e for n, e in enumerate(experts)}, tmp_path / "bundle")
    for number, expert in enumerate(experts):
        back = tall_masks.reconstruct(bundle, f"e{number}", tmp_path / f"back-{number}")
        assert torch.allclose(whole(back), whole(expert), atol=1e-6)
    told = tall_masks.report(bundle)
    assert sum(told["active"]) == pytest.approx(1) and told["active"][1] == pytest.approx(1)


def test_one_expert_alone_comes_back_and_a_bundle_is_what_the_formula_says(members, tmp_path):
    bundle = stream.apply(tall_masks.TallMasks(names=["one"]), members[:2], tmp_path / "one")
    assert torch.allclose(whole(tall_masks.reconstruct(bundle, "one", tmp_path / "back")), whole(members[1]), atol=1e-6)
    full = stream.apply(tall_masks.TallMasks(), members, tmp_path / "three")
    sizes = [math.prod(tensor.shape) for tensor in members[0].tensors.values()]
    assert tall_masks.report(full)["bytes"] == 8 * sum(sizes) + 3 * sum(-(-size // 8) for size in sizes)
    assert verify.verify(full.path).sound and torch.equal(whole(full), whole(members[0]))


def test_what_a_bundle_gives_back_is_what_the_masks_say_and_lineage_says_of_which_threshold(members, tmp_path):
    thresholds = [0.2, 0.5, 1.0]
    bundle = stream.apply(tall_masks.TallMasks(names=["a", "b", "c"], thresholds=thresholds), members, tmp_path / "bundle")
    tau = vectors(members)
    on = tau.abs() > torch.tensor(thresholds)[:, None] * (tau.sum(0) - tau).abs()
    for row, name in enumerate("abc"):
        back = tall_masks.reconstruct(bundle, name, tmp_path / name)
        assert torch.allclose(whole(back), whole(members[0]) + on[row] * tau.sum(0), atol=1e-6)
        assert back.lineage.options["bundle"]["threshold"] == thresholds[row] and back.lineage.parents[0].digest == bundle.digest
    assert list(tall_masks.report(bundle)["density"].values()) == pytest.approx(on.float().mean(1).tolist())
    with pytest.raises(NotFoundError, match="no expert 'd'"):
        tall_masks.reconstruct(bundle, "d", tmp_path / "d")
    with pytest.raises(InputError, match="not a bundle"):
        tall_masks.reconstruct(members[0], "a", tmp_path / "d")


def test_thresholds_are_chosen_by_validation_and_lineage_keeps_the_values(small_run, tmp_path):
    base, *experts = small_run.checkpoints()[:3]

    def measure(model, tokenizer):
        total = sum(float(p.detach().abs().sum()) for p in model.parameters())
        return Score("sum", "sum", -total, 0.0, 1)

    bundle = tall_masks.bundle(base, {"x": experts[0], "y": experts[1]}, tmp_path / "b", validate={"x": measure, "y": measure})
    values = bundle.lineage.options["validation"]
    for name, threshold in zip("xy", bundle.lineage.options["thresholds"], strict=True):
        assert values[name][str(threshold)] == max(values[name].values()) and len(values[name]) == 5
    with pytest.raises(InputError, match="no measure for the expert 'y'"):
        tall_masks.bundle(base, {"x": experts[0], "y": experts[1]}, tmp_path / "c", validate={"x": measure})


@pytest.mark.parametrize("multi", ["sum", "ties"])
def test_consensus_of_no_task_is_the_plain_merge_and_of_more_tasks_than_there_are_the_base(members, tmp_path, multi):
    plain = TaskArithmetic(scale=0.4) if multi == "sum" else Ties(scale=0.4, density=0.5, scope="model", aggregate="sum")
    expected = stream.apply(plain, members, tmp_path / "plain")
    options = {"scale": 0.4, "multi": multi, "density": 0.5}
    results = [stream.apply(Consensus(min_tasks=k, **options), members, tmp_path / str(k)) for k in (0, 1, 2, 4)]
    assert torch.equal(whole(results[0]), whole(expected)) and torch.equal(whole(results[3]), whole(members[0]))
    kept = [int((whole(result) != whole(members[0])).sum()) for result in results]
    assert kept[0] > kept[2] > 0 and kept == sorted(kept, reverse=True)


def test_consensus_keeps_what_enough_experts_need(members, tmp_path):
    result = stream.apply(Consensus(min_tasks=2, thresholds=0.5), members, tmp_path / "c")
    tau = vectors(members)
    needed = (tau.abs() > 0.5 * (tau.sum(0) - tau).abs()).sum(0) >= 2
    assert torch.allclose(whole(result), whole(members[0]) + tau.sum(0) * needed, atol=1e-6)


def pcb_in_numpy(tau, keep, scale, variant, weights=None):
    """The six steps of the paper's code, in float64 over whole vectors."""
    tau = np.asarray(tau, np.float64)
    count, size = tau.shape
    eps = EPS[variant]
    absolute = np.sort(np.abs(tau), axis=1)
    low, high = absolute[:, [int(size * eps)]], absolute[:, [int(size * (1 - eps) - 1)]]
    a = np.clip(np.abs(tau), low, high)

    def minmax(x):
        span = x.max(1, keepdims=True) - x.min(1, keepdims=True)
        return np.divide(x - x.min(1, keepdims=True), span, out=np.zeros_like(x), where=span > 0)

    u = np.sign(tau) * minmax(a)
    intra = np.exp(count * minmax(a) ** 2)
    if variant == "pairwise":
        inter = np.array([sum(np.tanh(u[i] * u[j]) for j in range(count)) for i in range(count)])
    else:
        inter = np.tanh(tau * (u.sum(0) if variant == "vision" else tau.sum(0)))
    beta = intra * inter
    cut = np.sort(beta, axis=1)[:, [int(size * (1 - keep))]]
    scores = minmax(np.maximum(beta, cut))
    w = np.ones((count, 1)) if weights is None else np.array(weights)[:, None]
    return scale * (w * scores * np.sign(tau) * a).sum(0) / np.maximum(scores.sum(0), 1e-12), scores


SHAPES = {"model.a": (40, 30), "model.b": (77,)}


@pytest.mark.parametrize("variant", list(EPS))
@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_pcb_is_numpys(tmp_path, variant, keep):
    members = family(tmp_path, shapes=SHAPES)
    result = stream.apply(Pcb(keep=keep, scale=1.2, variant=variant, weights=[1, 2, 0.5]), members, tmp_path / "out")
    expected, scores = pcb_in_numpy(vectors(members), keep, 1.2, variant, [1, 2, 0.5])
    assert np.abs(whole(result).numpy() - whole(members[0]).numpy() - expected).max() < 1e-6
    size = scores.shape[1]
    assert all(abs((row > 0).mean() - keep) <= 2 / size for row in scores)
    outside = (scores > 0).sum(0) == 0
    assert outside.any() and torch.equal(whole(result)[outside], whole(members[0])[outside])


def test_pcb_does_not_depend_on_the_order_of_experts_and_two_equal_ones_are_one(tmp_path):
    members = family(tmp_path, shapes=SHAPES)
    results = [stream.apply(Pcb(keep=0.3), [members[0], *order], tmp_path / str(n)) for n, order in enumerate(itertools.permutations(members[1:]))]
    assert all(torch.allclose(whole(result), whole(results[0]), atol=1e-7) for result in results)
    twin = saved(tmp_path / "twin", members[1].tensors.load())
    both, one = stream.apply(Pcb(keep=0.3), [members[0], members[1], twin], tmp_path / "both"), stream.apply(Pcb(keep=0.3), members[:2], tmp_path / "one")
    common = (whole(one) != whole(members[0])) & (whole(both) != whole(members[0]))
    assert common.any() and torch.allclose(whole(both)[common], whole(one)[common], atol=1e-6)


def test_pairwise_pcb_does_not_depend_on_the_size_of_task_vectors_and_the_reference_does(tmp_path):
    gaps = {}
    for variant in ("pairwise", "reference"):
        small, large = (family(tmp_path / f"{variant}-{size}", shapes=SHAPES, size=size) for size in (0.25, 2.0))
        a, b = (stream.apply(Pcb(keep=0.5, variant=variant), m, tmp_path / f"{variant}-{n}") for n, m in enumerate((small, large)))
        gaps[variant] = float(((whole(a) - whole(small[0])) * 8 - (whole(b) - whole(large[0]))).abs().max())
    assert gaps["pairwise"] < 1e-4 < 1e-2 < gaps["reference"]


def test_experts_that_changed_by_a_constant_do_not_divide_by_zero(tmp_path):
    base = drawn(0)
    members = [saved(tmp_path / str(k), {name: tensor + k for name, tensor in base.items()}) for k in range(3)]
    result = merge("pcb", members[1:], tmp_path / "out", base=members[0])
    assert torch.isfinite(whole(result)).all()


@pytest.mark.parametrize("limit", [2**20, 2**9])
def test_order_statistics_are_those_of_sorting_everything_however_little_is_collected(tmp_path, monkeypatch, limit):
    from cairn.checkpoint.operating.walk import Walk
    from cairn.merging import order_statistics as module

    monkeypatch.setattr(module, "LIMIT", limit)
    shapes = {f"w{i}": (300, 211) for i in range(4)} | {"zeros": (50_000,)}
    tensors = {name: tensor * (0 if name == "zeros" else 10.0 ** (i - 2)) for i, (name, tensor) in enumerate(drawn(3, shapes).items())}
    members = [saved(tmp_path / "a", tensors), saved(tmp_path / "b", {name: -3 * tensor for name, tensor in tensors.items()})]
    walk = Walk(members, [tensor.spec for tensor in members[0].tensors.values()], threads=2)
    ordered = [whole(member).abs().sort().values for member in members]
    ranks = [0, 7, walk.items // 5, walk.items // 2, int(walk.items * 0.8), walk.items - 2, walk.items - 1]
    found = module.order_statistics(walk, lambda piece: torch.stack([x.abs() for x in piece.inputs]), [ranks, ranks])
    assert found == [[float(line[rank]) for rank in ranks] for line in ordered]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_order_statistics_are_right_where_the_sampled_runs_are_unlike_the_rest(tmp_path, monkeypatch, sign):
    """Rows of an embedding differ by rarity: a sample of runs can miss the wanted rank on either side of its bracket."""
    from cairn.checkpoint.operating.walk import Walk
    from cairn.merging import order_statistics as module

    monkeypatch.setattr(module, "LIMIT", 2**9)
    values = drawn(3, {"w": (1000, 100)})["w"].abs() + 5
    member = saved(tmp_path / "a", {"w": sign * values})
    walk = Walk([member], [member.tensors["w"].spec])
    flat = (sign * values).reshape(-1).clone()
    for piece in walk.sample(2**9):
        flat[piece.begin : piece.begin + piece.size] /= 100
    member = saved(tmp_path / "b", {"w": flat.view(1000, 100)})
    walk, ranks = Walk([member], [member.tensors["w"].spec]), [0, 50_000, 99_000, 99_999]
    found = module.order_statistics(walk, lambda piece: torch.stack(list(piece.inputs)), [ranks])
    assert found == [[float(flat.sort().values[rank]) for rank in ranks]]
