"""The kernel of attention equals the definition in values and gradients, gives a sequence the same bits in any company, and steps aside."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cairn.models import masks
from cairn.models.families.llama import Llama
from cairn.models.families.olmo2 import Olmo2
from cairn.models.kernels import attention
from cairn.models.rope import rotate

LANES = attention.lanes()
needs_kernel = pytest.mark.skipif(not LANES, reason="no C compiler, so no kernel")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(batch: int, heads: int, groups: int, queries: int, keys: int, size: int, seed: int = 0) -> list[Tensor]:
    """q, k, v and a gradient of the result, laid out as projections lay them out."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, queries, heads * groups, size), (batch, keys, heads, size), (batch, keys, heads, size), (batch, queries, heads * groups, size)]
    return [torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes]


def exact(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, allowed: Tensor, scale: float) -> list[Tensor]:
    """The definition, in float64, and its gradients; a query that sees nothing gets 0."""
    q, k, v = (tensor.detach().double().requires_grad_() for tensor in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    scores = (q @ k.repeat_interleave(groups, 1).transpose(2, 3) * scale).masked_fill(~allowed, -torch.inf)
    shares = torch.where(allowed.any(-1, keepdim=True), scores, 0.0).softmax(-1) * allowed
    result = shares @ v.repeat_interleave(groups, 1)
    return [result, *torch.autograd.grad(result, [q, k, v], gradient.double())]


def ours(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, mask: Tensor | None, causal: bool, scale: float) -> list[Tensor]:
    q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
    assert attention.suits(q, k, v, mask)
    result = attention.attention(q, k, v, mask, causal, scale)
    return [result, *torch.autograd.grad(result, [q, k, v], gradient)]


def agree(found: list[Tensor], wanted: list[Tensor], scale: float) -> None:
    """Up to rounding: a slope is a difference of two sums over a head, so where it should be 0 their rounding stays, times the scale."""
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-5 + 2e-6 * found[0].shape[-1] * scale)


@needs_kernel
@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    queries=st.integers(attention.FEWEST_QUERIES, 90),
    keys=st.integers(1, 300),
    vectors=st.integers(1, 8),
    kind=st.sampled_from(["causal", "full", "random", "one mask for all"]),
    scale=st.sampled_from([None, 1.0, 0.05]),
)
def test_equals_the_definition(batch: int, heads: int, groups: int, queries: int, keys: int, vectors: int, kind: str, scale: float | None) -> None:
    size = min(vectors * LANES, attention.LARGEST_HEAD)
    scale = 1 / math.sqrt(size) if scale is None else scale
    if kind == "causal":
        keys = queries
    tensors = drawn(batch, heads, groups, queries, keys, size)
    generator = torch.Generator().manual_seed(1)
    allowed = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    mask = None
    if kind == "causal":
        allowed = allowed.tril()
    elif kind != "full":
        mask = allowed = torch.rand(batch if kind == "random" else 1, 1, queries, keys, generator=generator) < 0.3
    agree(ours(*tensors, mask, kind == "causal", scale), exact(*tensors, allowed, scale), scale)


@needs_kernel
@pytest.mark.parametrize("length", [64, 300, 700])
@pytest.mark.parametrize("kind", ["documents", "prefix", "packed prefix", "padded"])
def test_masks_of_training(kind: str, length: int) -> None:
    ids = (torch.arange(length) // 37).expand(2, length)
    flags = torch.arange(length).remainder(37).lt(9).expand(2, length)
    mask = {
        "documents": masks.document(ids),
        "prefix": masks.prefix(torch.tensor([5, length // 2])),
        "packed prefix": masks.packed_prefix(ids, flags),
        "padded": masks.padded(torch.arange(length).expand(2, length) < torch.tensor([[length], [length // 3]])),
    }[kind]
    q, k, v, gradient = drawn(2, 2, 2, length, length, 2 * LANES)
    plan = masks.prepare(mask, 2, length, length, q.device)
    found = ours(q, k, v, gradient, plan.dense, False, 0.2)
    agree(found, exact(q, k, v, gradient, mask.dense(2, length, length), 0.2), 0.2)
    torch.testing.assert_close(masks.attend(q, k, v, plan, 0.2), found[0].detach(), rtol=0, atol=0)


@needs_kernel
@pytest.mark.parametrize("kind", ["causal", "documents"])
@pytest.mark.parametrize("heads, kv_heads, size", [(2, 2, 2 * LANES), (6, 2, 4 * LANES)])
@pytest.mark.parametrize("own_positions", [False, True])
def test_queries_and_keys_are_turned_on_the_way(kind: str, heads: int, kv_heads: int, size: int, own_positions: bool) -> None:
    length, generator = 75, torch.Generator().manual_seed(0)
    wide = torch.randn(2, length, (heads + 2 * kv_heads) * size, generator=generator, requires_grad=True)
    gradient = torch.randn(2, length, heads * size, generator=generator)
    angles = 5 * torch.rand(2 if own_positions else 1, length, 1, size // 2, generator=generator)
    plan = masks.prepare(masks.document((torch.arange(length) // 20).expand(2, length)) if kind == "documents" else None, 2, length, length, wide.device)
    found = attention.rotary(wide, heads, (angles.cos(), angles.sin()), plan.dense, plan.is_causal, 0.2)
    assert found is not None
    q, k, v = wide.detach().double().unflatten(-1, (-1, size)).split([heads, kv_heads, kv_heads], 2)
    apart = [tensor.requires_grad_() for tensor in (q, k, v)]
    turned = [rotate(tensor, angles.double().cos(), angles.double().sin()).transpose(1, 2) for tensor in apart[:2]]
    allowed = plan.dense if plan.dense is not None else torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    scores = (turned[0] @ turned[1].repeat_interleave(heads // kv_heads, 1).transpose(2, 3) * 0.2).masked_fill(~allowed, -torch.inf)
    wanted = (scores.softmax(-1) @ apart[2].transpose(1, 2).repeat_interleave(heads // kv_heads, 1)).transpose(1, 2).flatten(2)
    slopes = torch.cat(torch.autograd.grad(wanted, apart, gradient.double()), 2).flatten(2)
    agree([found, torch.autograd.grad(found, wide, gradient)[0]], [wanted, slopes], 0.2)
    strided = torch.empty(2, length, 2 * wide.shape[-1])[:, :, : wide.shape[-1]].copy_(wide)
    transposed = [turn.transpose(1, 3).contiguous().transpose(1, 3) for turn in (angles.cos(), angles.sin())]
    again = attention.rotary(strided, heads, (transposed[0], transposed[1]), plan.dense, plan.is_causal, 0.2)
    assert again is not None and torch.equal(again, found)


@needs_kernel
@pytest.mark.parametrize("family, at_once", [(Llama, True), (Olmo2, False)])
def test_decoders_take_the_shortest_way(family: type, at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2 * LANES
    model = family(vocab_size=50, hidden_size=4 * size, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40).build(0)
    ids = torch.arange(120).remainder(47).view(2, 60)
    called, rotary = [], attention.rotary
    monkeypatch.setattr(attention, "rotary", lambda *arguments: called.append(True) or rotary(*arguments))
    short = model(ids, targets=ids).loss
    gradients = torch.autograd.grad(short, list(model.parameters()))
    assert len(called) == 2 * at_once
    monkeypatch.setattr(attention, "rotary", lambda *arguments: None)
    monkeypatch.setattr(attention, "suits", lambda *arguments: False)
    long = model(ids, targets=ids).loss
    torch.testing.assert_close(short, long)
    for one, other in zip(gradients, torch.autograd.grad(long, list(model.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()) + 1e-6)


@needs_kernel
def test_who_sees_nothing_gets_nothing() -> None:
    q, k, v, gradient = drawn(1, 1, 1, 40, 40, LANES)
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    mask[0, 0, 3], mask[0, 0, 32:] = False, False
    result, dq, dk, dv = ours(q, k, v, gradient, mask, False, 1.0)
    for tensor in (result, dq):
        assert not tensor[0, 0, 3].any() and not tensor[0, 0, 32:].any() and tensor[0, 0, 2].all()
    assert dk.isfinite().all() and dv.isfinite().all()


@needs_kernel
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    q, k, v, gradient = drawn(1, 1, 1, 40, 40, LANES)
    k[0, 0, 10, 0] = bad
    result = ours(q, k, v, gradient, None, True, 1.0)[0]
    spoiled = torch.arange(40) >= 10
    if bad == math.inf:
        spoiled &= q[0, 0, :, 0] > 0  # elsewhere the score is -inf, and the key is not seen
    assert torch.equal(result[0, 0].isnan().any(-1), spoiled)


@needs_kernel
def test_a_sequence_gives_the_same_bits_in_any_company() -> None:
    q, k, v, gradient = drawn(3, 2, 2, 70, 70, 2 * LANES)
    together = ours(q, k, v, gradient, None, True, 0.3)
    for b in range(3):
        for one, all_of_them in zip(ours(*(t[b : b + 1] for t in (q, k, v, gradient)), None, True, 0.3), together, strict=True):
            assert torch.equal(one[0], all_of_them[b])
    torch.set_num_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(ours(q, k, v, gradient, None, True, 0.3), together, strict=True))
    shorter = attention.attention(q[:, :, :41], k[:, :, :41], v[:, :, :41], None, True, 0.3)
    assert torch.equal(shorter, together[0][:, :, :41])


@needs_kernel
def test_layouts_of_memory_do_not_matter() -> None:
    q, k, v, gradient = drawn(2, 2, 1, 33, 33, LANES)
    wanted = ours(q, k, v, gradient, None, True, 0.3)
    odd = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in (q, k, v, gradient)]
    assert all(torch.equal(a, b) for a, b in zip(ours(*odd, None, True, 0.3), wanted, strict=True))
    joined = torch.cat([q, k, v], 1)
    parts = ours(joined[:, :2], joined[:, 2:4], joined[:, 4:], gradient, None, True, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(parts, wanted, strict=True))
    ones = ours(q, k, v, torch.ones(()).expand(gradient.shape), None, True, 0.3)
    agree(ones, exact(q, k, v, torch.ones(gradient.shape), torch.ones(1, 1, 33, 33, dtype=torch.bool).tril(), 0.3), 0.3)


@needs_kernel
def test_operator_keeps_torchs_rules() -> None:
    q, k, v, _ = (tensor.requires_grad_() for tensor in drawn(2, 2, 2, 33, 33, LANES))
    mask = torch.rand(2, 1, 33, 33) < 0.5
    torch.library.opcheck(torch.ops.cairn.attention.default, (q, k, v, mask, False, 0.3))
    torch.library.opcheck(torch.ops.cairn.attention.default, (q, k, v, None, True, 0.3))
    wide, angles = torch.randn(2, 33, 8 * 2 * LANES, requires_grad=True), torch.rand(1, 33, LANES)
    torch.library.opcheck(torch.ops.cairn.rotary_attention.default, (wide, 4, angles.cos(), angles.sin(), mask, False, 0.3))
    run = torch.compile(masks.attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(q, k, v, masks.MaskPlan(is_causal=True)), masks.attend(q, k, v, masks.MaskPlan(is_causal=True)), rtol=0, atol=0)


@pytest.mark.parametrize("why", ["float64", "bfloat16", "few queries", "size", "numbers added", "mask of heads", "autocast", "threads"])
def test_steps_aside(why: str) -> None:
    q, k, v, _ = drawn(2, 2, 1, 3 if why == "few queries" else 40, 40, 22 if why == "size" else 32)
    plan = masks.MaskPlan()
    if why in ("float64", "bfloat16"):
        q, k, v = (tensor.to(getattr(torch, why)) for tensor in (q, k, v))
    elif why == "numbers added":
        plan = masks.MaskPlan(dense=torch.randn(2, 1, 40, 40))
    elif why == "mask of heads":
        plan = masks.MaskPlan(dense=torch.rand(2, 2, 40, 40) < 0.9)
    elif why == "threads":
        torch.set_num_threads(5)
    with torch.autocast("cpu", enabled=why == "autocast"):
        assert not attention.suits(q, k, v, plan.dense)
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=plan.dense)
        assert torch.equal(masks.attend(q, k, v, plan), wanted)


def test_loading_the_kernels_does_not_load_torchs_compiler() -> None:
    code = "import sys, cairn.models.decoder; print([name for name in sys.modules if name.startswith('torch._dynamo')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
