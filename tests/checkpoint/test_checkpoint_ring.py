"""The ring: regions never overlap, room comes back oldest first, and nobody waits for ever."""

import queue
import random
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cairn.checkpoint.saving.ring import ALIGNMENT, Ring


@given(st.lists(st.integers(1, 900), min_size=1, max_size=60), st.integers(900, 3000), st.integers(0, 10**6), st.integers(1, 6))
def test_live_regions_never_overlap_and_all_get_their_turn(sizes, capacity, seed, depth):
    ring, live, taken = Ring(capacity), {}, queue.Queue()
    lock, chooser = threading.Lock(), random.Random(seed)

    def consume():
        """Gives back in random order, at most `depth` behind."""
        held, open_ = [], True
        while open_ or held:
            if open_:
                region = taken.get()
                open_ = region is not None
                if open_:
                    held.append(region)
            # The oldest must go at some time, whatever the order: a taker may be waiting for it.
            while held and (len(held) >= depth or not open_ or taken.empty()):
                region = held.pop(chooser.randrange(len(held)))
                assert bool((ring.view(region) == live[region]).all())
                with lock:
                    del live[region]
                ring.give_back(region)

    consumer = threading.Thread(target=consume)
    consumer.start()
    for number, size in enumerate(sizes):
        region = ring.take(size)
        assert region.begin % ALIGNMENT == 0 and region.begin + size <= ring.capacity
        with lock:
            assert all(region.begin + size <= other.begin or other.begin + other.size <= region.begin for other in live)
            live[region] = number % 251
        ring.view(region).fill_(number % 251)
        taken.put(region)
    taken.put(None)
    consumer.join(timeout=30)
    assert not consumer.is_alive() and not live and ring.peak <= ring.capacity


def test_room_comes_back_oldest_first():
    ring = Ring(3 * ALIGNMENT)
    first, second, third = (ring.take(ALIGNMENT) for _ in range(3))
    ring.give_back(third)
    ring.give_back(second)
    assert ring._place(ALIGNMENT) is None  # the oldest is still held
    ring.give_back(first)
    assert ring.take(3 * ALIGNMENT).begin == 0 and ring.peak == 3 * ALIGNMENT


def test_a_taker_waits_for_room_and_the_wait_is_counted():
    ring = Ring(1024)
    region = ring.take(1024)
    threading.Timer(0.05, ring.give_back, [region]).start()
    assert ring.take(512).size == 512 and 0.03 < ring.waited < 5


def test_more_than_the_capacity_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        Ring(1024).take(1025)


def test_without_page_locked_memory_it_goes_on_and_says_so(monkeypatch):
    original = torch.empty

    def empty(*arguments, pin_memory=False, **options):
        if pin_memory:
            raise RuntimeError("no accelerator")
        return original(*arguments, **options)

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.warns(UserWarning, match="page-locked"):
        assert Ring(1024, pinned=True).capacity == 1024
