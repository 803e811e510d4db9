"""Masks by brute force: every pair of positions is asked in plain Python."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cairn.models import masks

T = 9


def by_hand(rule: Callable[[int, int, int], bool], batch: int, queries: int, keys: int, offset: int = 0) -> Tensor:
    table = [[[[rule(b, offset + q, k) for k in range(keys)] for q in range(queries)]] for b in range(batch)]
    return torch.tensor(table)


ids_of = st.lists(st.lists(st.integers(0, 3), min_size=T, max_size=T).map(sorted), min_size=2, max_size=2)
flags_of = st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=2, max_size=2)


@given(ids_of, flags_of, st.lists(st.integers(0, T), min_size=2, max_size=2))
@settings(max_examples=40, deadline=None)
def test_every_mask_is_its_rule(ids: list[list[int]], flags: list[list[bool]], lengths: list[int]) -> None:
    i, f, n = torch.tensor(ids), torch.tensor(flags), torch.tensor(lengths)
    cases: list[tuple[masks.Mask, Callable[[int, int, int], bool]]] = [
        (masks.causal(), lambda b, q, k: k <= q),
        (masks.full(), lambda b, q, k: True),
        (masks.document(i), lambda b, q, k: k <= q and ids[b][q] == ids[b][k]),
        (masks.document(i, within=masks.full()), lambda b, q, k: ids[b][q] == ids[b][k]),
        (masks.prefix(n), lambda b, q, k: k <= q or k < lengths[b]),
        (masks.prefix(f), lambda b, q, k: k <= q or flags[b][k]),
        (masks.packed_prefix(i, f), lambda b, q, k: ids[b][q] == ids[b][k] and (k <= q or flags[b][k])),
        (masks.padded(f), lambda b, q, k: k <= q and flags[b][k]),
        (masks.cross(f), lambda b, q, k: flags[b][k]),
        (masks.cross(f, i, i.flip(1)), lambda b, q, k: flags[b][k] and ids[b][q] == ids[b][T - 1 - k]),
        (masks.causal() | masks.padded(f, within=masks.full()), lambda b, q, k: k <= q or flags[b][k]),
    ]
    for mask, rule in cases:
        assert torch.equal(mask.dense(2, T, T), by_hand(rule, 2, T, T))
        assert torch.equal(mask.dense(2, 2, T, offset=T - 2), by_hand(rule, 2, 2, T, T - 2))


def attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Attention as it is defined, in float64, heads repeated by hand."""
    repeat = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(repeat, 1), v.double().repeat_interleave(repeat, 1)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1) @ v


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("kind", ["causal", "document", "prefix", "full"])
@pytest.mark.parametrize("queries", [128, 40])
def test_both_backends_equal_the_definition(kv_heads: int, backend: str, kind: str, queries: int) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = 128
    q = torch.randn(2, 4, queries, 16, generator=generator)
    k, v = (torch.randn(2, kv_heads, keys, 16, generator=generator) for _ in range(2))
    ids = (torch.arange(keys) // 30)[None].repeat(2, 1)
    mask = {"causal": masks.causal(), "full": masks.full(), "document": masks.document(ids), "prefix": masks.prefix(torch.tensor([20, 3]))}[kind]
    plan = masks.prepare(mask, 2, queries, keys, torch.device("cpu"), backend)
    allowed = mask.dense(2, queries, keys, keys - queries)
    torch.testing.assert_close(masks.attend(q, k, v, plan).double(), attention(q, k, v, allowed), rtol=1e-4, atol=1e-5)


def test_the_plain_causal_mask_is_left_to_the_kernel() -> None:
    cpu = torch.device("cpu")
    whole, one = masks.prepare(None, 2, 8, 8, cpu), masks.prepare(masks.causal(), 2, 1, 8, cpu)
    assert whole.is_causal and whole.dense is None and not one.is_causal and one.dense is None
    later = masks.prepare(None, 2, 3, 8, cpu)  # kernels align a causal mask with the first key, the cache needs the last
    assert later.dense is not None and torch.equal(later.dense[0, 0], torch.ones(3, 8).tril(5).bool())
