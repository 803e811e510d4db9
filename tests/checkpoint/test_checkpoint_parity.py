"""Rotating parity: where blocks lie, and that any loss that it is meant for gives back every byte."""

import itertools

import numpy as np
import pytest

from cairn.checkpoint.memory.parity import Code
from cairn.errors import InputError

SHAPES = [(n, p) for n in range(2, 9) for p in (1, 2, 3) if p < n]


@pytest.mark.parametrize(("members", "parity"), SHAPES)
def test_every_block_is_in_one_stripe_and_no_member_has_two_pieces_of_one(members, parity):
    code = Code(members, parity)
    places = [(position, code.block(stripe, position)) for stripe in range(members) for position in range(members)]
    blocks = [place for place in places if place[1] is not None]
    assert sorted(blocks) == list(itertools.product(range(members), range(code.blocks)))
    for stripe in range(members):
        data = [position for position in range(members) if code.block(stripe, position) is not None]
        assert sorted(data + [code.holder(stripe, number) for number in range(parity)]) == list(range(members))
        assert all(code.stripe(position, code.block(stripe, position)) == stripe for position in data)


def encoded(code, bodies):
    """The parity of each member: number -> bytes of a block, computed as the keepers do."""
    size = code.block_bytes(max(map(len, bodies)))
    padded = [np.frombuffer(body.ljust(size * code.blocks, b"\0"), np.uint8) for body in bodies]
    found = []
    for position in range(code.members):
        held = {}
        for number in range(code.parity):
            stripe = (position - number) % code.members
            where = {code.block(stripe, other): other for other in range(code.members)}
            pieces = [padded[where[block]][block * size : (block + 1) * size] for block in range(code.blocks)]
            held[number] = code.encode(pieces, number)
        found.append(held)
    return size, padded, found


@pytest.mark.parametrize(("members", "parity"), [shape for shape in SHAPES if shape[1] == 1 or shape[0] <= 6])
def test_every_loss_of_as_many_as_there_is_parity_gives_back_every_byte(members, parity):
    chooser = np.random.default_rng(members)
    code = Code(members, parity)
    lengths = [0, *(int(n) for n in chooser.integers(1, 1000, members - 1))]  # one has nothing, none divides evenly
    bodies = [chooser.bytes(length) for length in lengths]
    size, padded, held = encoded(code, bodies)
    if parity == 1:
        assert all(len(held[position][0]) == -(-max(lengths) // (members - 1)) for position in range(members))
    for lost in itertools.combinations(range(members), parity):
        for gone in lost:
            blocks = []
            for block in range(code.blocks):
                stripe = code.stripe(gone, block)
                pieces = {}
                for position in range(members):
                    other = code.block(stripe, position)
                    if position not in lost and other is not None:
                        pieces[other] = padded[position][other * size : (other + 1) * size]
                for number in range(parity):
                    if code.holder(stripe, number) not in lost:
                        pieces[code.blocks + number] = held[code.holder(stripe, number)][number]
                chosen = dict(list(pieces.items())[: code.blocks])
                assert len(chosen) == code.blocks
                blocks.append(code.decode(chosen, block).tobytes())
            assert b"".join(blocks)[: lengths[gone]] == bodies[gone]


@pytest.mark.parametrize(("members", "parity"), [(1, 1), (3, 3), (4, 0)])
def test_a_group_too_small_for_its_parity_is_refused(members, parity):
    with pytest.raises(InputError, match="need a group of more"):
        Code(members, parity)
