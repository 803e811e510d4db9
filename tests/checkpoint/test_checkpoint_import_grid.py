"""The importer on any grid of ranks: a layout made up here, whose slices lie in memory."""

import functools
import math

import pytest
import torch

from cairn import catalog
from cairn.checkpoint.foreign.importing import import_
from cairn.checkpoint.foreign.layouts import WEIGHT, Layout, Slice, TensorSource
from cairn.checkpoint.foreign.patterns import Expert, Fused, Replicated, Shard
from cairn.checkpoint.foreign.spec import ShardSpec
from cairn.errors import InputError, MismatchError, NotFoundError

CONFIG = {"model_type": "none"}
held: dict[str, TensorSource] = {}


@pytest.fixture
def bring(tmp_path):
    """Import slices as if a program had saved them."""

    @catalog.register("layout", "in-memory")
    class InMemory(Layout):
        """Slices in memory."""

        @classmethod
        def recognises(cls, folder):
            return False

        def open(self, opening):
            return held["source"]

    def call(slices, grid, out="out", **options):
        held["source"] = TensorSource(grid, slices, config=CONFIG, **options.pop("source", {}))
        (tmp_path / "in").mkdir(exist_ok=True)
        return import_(tmp_path / "in", tmp_path / out, layout="in-memory", **options)

    yield call
    catalog._entries.pop(("layout", "in-memory"))


def slices_of(name, pieces, **place):
    """One slice for each tensor rank."""
    return [Slice(name, WEIGHT, tuple(p.shape), p.dtype, functools.partial(torch.clone, p), tensor=rank, **place) for rank, p in enumerate(pieces)]


def filled(*shape, dtype=torch.float32):
    return torch.arange(math.prod(shape), dtype=dtype).reshape(shape)


@pytest.mark.parametrize("ways", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rule_at_once(ways, dtype, bring):
    widths = tuple(tuple(1 + (rank == index) for rank in range(ways)) for index in range(3))
    whole = {"norm": filled(7, dtype=dtype), "rows": filled(12, 5, dtype=dtype), "columns": filled(5, 10, dtype=dtype), "vocab": filled(11, 3, dtype=dtype)}
    whole |= {"gate_up": filled(24, 5, dtype=dtype), "qkv": filled(sum(map(sum, widths)), 5, dtype=dtype)}
    rules = {
        "norm": Replicated(),
        "rows": Shard(0),
        "columns": Shard(1, "balanced"),
        "vocab": Shard(vocab=11),
        "gate_up": Fused(2),
        "qkv": Fused(widths=widths),
    }
    spec = ShardSpec.parse({
        "replicated": ["norm"], "fused": [{"pattern": "gate_up", "parts": 2}, {"pattern": "qkv", "widths": widths}],
        "shard": [{"pattern": "columns", "dim": 1, "uneven": "balanced"}, {"pattern": "vocab", "vocab": 11}],
    })  # fmt: skip
    slices = [piece for name, tensor in whole.items() for piece in slices_of(name, rules[name].split(name, tensor, ways))]
    result = bring(slices, {"tensor": ways}, spec=spec, workers=2)
    assert all(torch.equal(result.tensors[name].load(), tensor) for name, tensor in whole.items()) and set(result.tensors) == set(whole)


@pytest.mark.parametrize(("experts", "ways"), [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_experts_over_expert_and_tensor_ranks(experts, ways, bring):
    whole, router = filled(4, 6, 5), filled(4, 5)
    slices = []
    for expert, part in enumerate(Expert(4).split("w", whole, experts)):
        slices += slices_of("experts", Shard(1).split("w", part, ways), expert=expert)
        slices += slices_of("router", [router] * ways, expert=expert)
    spec = {"expert": [{"pattern": "experts", "count": 4, **({"dim": 1} if ways > 1 else {})}], "replicated": ["router"]}
    result = bring(slices, {"tensor": ways, "expert": experts}, spec=ShardSpec.parse(spec))
    assert torch.equal(result.tensors["experts"].load(), whole) and torch.equal(result.tensors["router"].load(), router)
    with pytest.raises(MismatchError, match="holds 4 experts, the spec says 5"):
        spec["expert"][0]["count"] = 5
        bring(slices, {"tensor": ways, "expert": experts}, "none", spec=ShardSpec.parse(spec))


def test_expert_ranks_that_disagree_about_what_they_share(bring):
    slices = [*slices_of("norm", [filled(3)], expert=0), *slices_of("norm", [filled(3) + 1], expert=1)]
    with pytest.raises(MismatchError, match="same on all expert ranks, and the copy of number 1 differs"):
        bring(slices, {"expert": 2})


def test_tensors_on_two_stages_must_be_said_to_be_tied(bring):
    slices = [*slices_of("embed", [filled(3, 2)], stage=0), *slices_of("embed", [filled(3, 2)], stage=3)]
    with pytest.raises(MismatchError, match="'embed' is held by pipeline stages 0 and 3; if it is tied over stages, list it under 'pipeline_replicated'"):
        bring(slices, {"pipeline": 4})
    result = bring(slices, {"pipeline": 4}, spec=ShardSpec(pipeline_replicated=["embed"]))
    assert torch.equal(result.tensors["embed"].load(), filled(3, 2))


def test_a_rank_may_own_nothing_only_where_that_is_recorded(bring):
    pieces = slices_of("qkv", [filled(3, 2), filled(2, 2)])
    spec = {"fused": [{"pattern": "qkv", "widths": [[1, 1, 0], [2, 1, 0]]}]}
    assert bring(pieces, {"tensor": 3}, spec=ShardSpec.parse(spec)).tensors["qkv"].shape == (5, 2)
    spec["fused"][0]["widths"] = [[1, 1, 1], [2, 1, 0]]
    with pytest.raises(NotFoundError, match="tensor rank 2 holds no piece of 'qkv'"):
        bring(pieces, {"tensor": 3}, "none", spec=ShardSpec.parse(spec))


def test_drift_of_averaged_copies_is_told(bring):
    copies = [filled(4), filled(4) * 1.01]
    result = bring(slices_of("norm", copies), {"tensor": 2}, spec=ShardSpec(average=["norm"]))
    assert any("copies of 'norm' that were averaged differ by 5.0e-03" in line for line in result.lineage.changed)


def test_other_names_of_a_tensor_and_what_is_left_out(bring):
    source = {"aliases": {"head": "embed"}, "left_out": ["the schedule"]}
    result = bring(slices_of("embed", [filled(3, 2)]), {}, source=source)
    assert torch.equal(result.tensors["head"].load(), result.tensors["embed"].load()) and "left out: the schedule" in result.lineage.changed


def test_scalars_can_not_be_joined_by_rows(bring):
    with pytest.raises(MismatchError, match="has 0 dimension"):
        bring(slices_of("scale", [torch.tensor(1.0)] * 2), {"tensor": 2})
    with pytest.raises(InputError, match="'scale' cannot be imported: it is a mystery"):
        bring(
            slices_of("scale", [torch.tensor(1.0)] * 2),
            {"tensor": 2},
            spec=ShardSpec.parse({"unsupported": [{"pattern": "scale", "reason": "it is a mystery"}]}),
        )
