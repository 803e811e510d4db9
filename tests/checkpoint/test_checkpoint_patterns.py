"""Every pattern: cut over any number of ranks and joined again, bit for bit; what cannot have been cut so is refused."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cairn.checkpoint.foreign import patterns
from cairn.checkpoint.foreign.patterns import AveragedCopies, Expert, Fused, Replicated, Shard, Unique, Unsupported
from cairn.errors import InputError, MismatchError

WAYS = st.integers(1, 4)
SIZES = st.integers(1, 13)


def filled(*shape, dtype=torch.float32):
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=dtype).reshape(shape)


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@given(SIZES, SIZES, WAYS, st.sampled_from([0, 1]), st.sampled_from(["ceil", "balanced"]), st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
def test_shards_of_any_width(rows, columns, ways, dim, uneven, dtype):
    whole, rule = filled(rows, columns, dtype=dtype), Shard(dim, uneven)
    pieces = rule.split("w", whole, ways)
    assert [piece.shape[dim] for piece in pieces] == patterns.widths_of(whole.shape[dim], ways, uneven)
    assert bits(rule.union("w", pieces)) == bits(whole)


def test_the_two_uneven_conventions_are_torchs_and_deepspeeds():
    assert patterns.widths_of(10, 4, "ceil") == [len(c) for c in torch.arange(10).chunk(4)] == [3, 3, 3, 1]
    assert patterns.widths_of(10, 4, "balanced") == [3, 3, 2, 2]
    assert patterns.widths_of(2, 4, "ceil") == [1, 1, 0, 0]


def test_an_uneven_cut_is_never_guessed():
    pieces = list(filled(10, 2).split([3, 3, 2, 2]))
    with pytest.raises(MismatchError, match=r"'w' is cut unevenly along dimension 0 \(3, 3, 2, 2\) and nothing records by which rule"):
        Shard().union("w", pieces)
    with pytest.raises(MismatchError, match=r"'ceil' would have cut it as \[3, 3, 3, 1\]"):
        Shard(0, "ceil").union("w", pieces)
    with pytest.raises(InputError, match="which 4 ranks cannot share evenly"):
        Shard().split("w", filled(10, 2), 4)
    assert torch.equal(Shard(0, "balanced").union("w", pieces), filled(10, 2))


@given(st.integers(2, 4), st.integers(1, 5), SIZES, WAYS, st.sampled_from([0, 1]))
def test_equal_fused_parts(parts, width, other, ways, dim):
    subs = [filled(width * ways, other) * 100**index for index in range(parts)]
    whole = torch.cat(subs) if dim == 0 else torch.cat(subs).reshape(-1, other).t().contiguous()
    rule = Fused(parts, dim=dim)
    pieces = rule.split("w", whole, ways)
    assert bits(rule.union("w", pieces)) == bits(whole)
    # Each rank holds its part of every sub-tensor: what a plain cut would hold is something else.
    first = torch.cat([sub.chunk(ways)[0] for sub in subs])
    assert torch.equal(pieces[0], first if dim == 0 else first.t())


@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=4), st.integers(1, 3), st.sampled_from([0, 1]))
def test_fused_parts_of_any_width_and_ranks_that_own_nothing(widths, other, dim):
    total = sum(map(sum, widths))
    whole = filled(total, other) if dim == 0 else filled(other, total)
    rule = Fused(widths=tuple(map(tuple, widths)), dim=dim)
    pieces = rule.split("w", whole, 3)
    assert [piece.shape[dim] for piece in pieces] == [sum(sub[rank] for sub in widths) for rank in range(3)]
    assert bits(rule.union("w", pieces)) == bits(whole)


@pytest.mark.parametrize(("rule", "sizes", "message"), [
    (Fused(2), [3, 3], "no even cut"), (Fused(2), [4, 2], "no even cut"),
    (Fused(widths=((2, 1), (1, 1))), [3, 3], "rank 1 holds 3 along dimension 0, and the recorded widths add up to 2"),
    (Fused(widths=((2, 1, 1),)), [2, 1], "the recorded widths are for 3 ranks, not for 2"),
])  # fmt: skip
def test_fused_pieces_that_do_not_fit_their_record(rule, sizes, message):
    with pytest.raises(MismatchError, match=message):
        rule.union("w", [filled(size, 2) for size in sizes])


@pytest.mark.parametrize(("heads", "groups"), [(6, 1), (6, 2), (6, 3)])
@pytest.mark.parametrize("ways", [1, 2, 3, 4])
def test_grouped_attention_cut_over_ranks_computes_the_same(heads, groups, ways):
    """Query, key and value in one matrix under grouped-query attention: the joined matrix gives exactly the attention of the whole one."""
    size, width = 4, 8
    queries, keys = ([n * size for n in patterns.widths_of(count, ways, "balanced")] for count in (heads, groups))
    rule = Fused(widths=(tuple(queries), tuple(keys), tuple(keys)))
    whole = torch.randn((heads + 2 * groups) * size, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def attention(fused):
        x = torch.linspace(-1, 1, 5 * width, dtype=torch.float64).reshape(5, width)
        q, k, v = (part.reshape(5, -1, size).transpose(0, 1) for part in (x @ fused.T).split([heads * size, groups * size, groups * size], 1))
        return torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], enable_gqa=True)

    pieces = rule.split("qkv", whole, ways)
    assert torch.equal(attention(rule.union("qkv", pieces)), attention(whole))
    if ways == 2 and groups == 2:
        assert not torch.allclose(attention(torch.cat(pieces)), attention(whole))  # the order of sub-tensors matters


@given(SIZES, SIZES, WAYS)
def test_a_padded_vocabulary_loses_its_padding_and_gets_it_again(vocabulary, width, ways):
    whole, rule = filled(vocabulary, width), Shard(vocab=vocabulary)
    pieces = rule.split("e", whole, ways)
    assert len({piece.shape for piece in pieces}) == 1 and bits(rule.union("e", pieces)) == bits(whole)


def test_a_vocabulary_larger_than_the_rows_is_refused():
    with pytest.raises(MismatchError, match="has 4 rows, fewer than the vocabulary of 5"):
        Shard(vocab=5).union("e", [filled(2, 2), filled(2, 2)])


def test_copies_must_agree_in_every_bit():
    copy = filled(3, 3)
    assert Replicated().union("n", [copy, copy.clone()]) is copy
    flipped = copy.clone()
    flipped.view(torch.int32)[1, 1] ^= 1
    with pytest.raises(MismatchError, match="'n' is said to be the same on all ranks, and the copy of number 2 differs"):
        Replicated().union("n", [copy, copy.clone(), flipped])
    negative = torch.zeros(1)
    with pytest.raises(MismatchError):
        Replicated().union("n", [negative, -negative])  # equal as numbers, not as bits
    nans = torch.full((1,), float("nan"))
    assert Replicated().union("n", [nans, nans.clone()]) is nans


def test_an_average_is_the_mean_in_float64():
    torch.manual_seed(0)
    copies = [torch.randn(50) for _ in range(3)]
    expected = torch.stack([c.double() for c in copies]).mean(0).float()
    assert torch.equal(AveragedCopies().union("n", copies), expected)
    assert bits(AveragedCopies().union("n", [copies[0]] * 3)) == bits(copies[0])
    assert patterns.spread([copies[0]] * 3) < 1e-15
    drifted = copies[0].clone()
    drifted[copies[0].abs().argmax()] *= 1 + 1e-3
    assert 4e-4 < patterns.spread([copies[0], drifted]) < 6e-4


@given(st.integers(1, 3), st.sampled_from([1, 2, 4]), SIZES)
def test_experts(each, ways, width):
    whole, rule = filled(each * ways, width, 2), Expert(each * ways)
    assert bits(rule.union("x", rule.split("x", whole, ways))) == bits(whole)
    with pytest.raises(MismatchError, match="the spec says"):
        Expert(each * ways + 1).union("x", rule.split("x", whole, ways))


def test_experts_that_can_not_be_shared_and_rules_that_refuse():
    with pytest.raises(InputError, match="3 ranks cannot share 4 experts"):
        Expert(4).split("x", filled(4, 2), 3)
    with pytest.raises(MismatchError, match="held by one rank and 2 hold"):
        Unique().union("x", [filled(1), filled(1)])
    with pytest.raises(InputError, match="'x' cannot be imported: a block-sparse layout"):
        Unsupported("a block-sparse layout").union("x", [filled(1)])
    with pytest.raises(MismatchError, match="cannot be joined along dimension 1"):
        Shard(1).union("x", [filled(2), filled(2)])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), WAYS, st.sampled_from([1, 2, 4]))
def test_flat_groups(sizes, ways, align):
    """ZeRO-1 and 2: one buffer for several tensors, cut evenly; every item comes back to its tensor, padding to none."""
    tensors = [filled(size) + 100 * index for index, size in enumerate(sizes)]
    local = -(-sum(sizes) // (ways * align)) * align
    buffer = torch.cat([*tensors, torch.full((local * ways - sum(sizes),), -1.0)])
    cut = patterns.flat_group_cut(sizes, ways, align)
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    for index, tensor in enumerate(tensors):
        stretches = []
        for rank, held in enumerate(cut):
            mine = buffer[rank * local : (rank + 1) * local]
            stretches += [mine[starts[i] + b - rank * local : starts[i] + e - rank * local] for i, b, e in held if i == index]
        assert torch.equal(patterns.join_flat("w", stretches or [torch.empty(0)], tensor.shape), tensor)


@given(st.integers(0, 40), WAYS)
def test_flat_parameters(numel, ways):
    whole = filled(numel)
    pieces = patterns.flat_param_split(whole, ways)
    assert bits(patterns.flat_param_union("w", pieces, (numel,))) == bits(whole)
    real = [patterns.flat_param_stretch(numel, rank, ways) for rank in range(ways)]
    assert [b for b, _ in real][1:] == [e for _, e in real][:-1] and real[-1][1] == numel


def test_flat_pieces_of_another_save_are_refused():
    with pytest.raises(MismatchError, match=r"should lie in pieces of 4, not of \[4, 3\]"):
        patterns.flat_param_union("w", [filled(4), filled(3)], (7,))
    with pytest.raises(MismatchError, match="has 6 items and the ranks hold 5"):
        patterns.join_flat("w", [filled(3), filled(2)], (2, 3))


def test_from_layout_to_layout_directly_and_over_the_whole_are_the_same():
    """Two ranks to three and back, over every rule: what a rank gets does not depend on the way."""
    whole = filled(12, 6)
    for rule, other in itertools.product([Shard(0), Shard(1), Fused(2)], repeat=2):
        there = other.split("w", rule.union("w", rule.split("w", whole, 2)), 3)
        assert [bits(piece) for piece in there] == [bits(piece) for piece in other.split("w", whole, 3)]
        back = rule.split("w", other.union("w", there), 2)
        assert [bits(piece) for piece in back] == [bits(piece) for piece in rule.split("w", whole, 2)]
