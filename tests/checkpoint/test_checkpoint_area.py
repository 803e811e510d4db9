"""The memory that a snapshot lies in: a death at any moment leaves the old one or the new one, and who protects whom."""

import itertools
import os
import struct

import pytest

from cairn.checkpoint.memory.area import BODY, CLEAN, Area, Header
from cairn.checkpoint.memory.snapshots import groups
from cairn.errors import InputError
from tests.faults import flip


def header(step, size):
    return Header(step=step, attempt="a", member=0, members=1, group=[0], parity=0, size=size)


def test_a_death_at_any_moment_leaves_the_old_snapshot_or_the_new_one(tmp_path):
    """A process writes version after version and dies at its k-th touch of the memory, for every k."""
    size, versions = 3 * 5000, 4

    def writer(deadly):
        count = itertools.count()

        def touch(original):
            def touched(*arguments):
                if next(count) == deadly:
                    os._exit(9)
                return original(*arguments)

            return touched

        for name in ("_set", "_set_header", "write", "root", "_fit"):
            setattr(Area, name, touch(getattr(Area, name)))
        areas = [Area(tmp_path / f"{deadly}-{number}") for number in range(2)]
        for step in range(1, versions + 1):
            area = areas[step % 2]
            area.begin(header(step, size + step))
            for piece in range(0, size + step, 5000):
                area.write(piece, bytes([step]) * min(5000, size + step - piece))
            area.seal()
            (tmp_path / f"{deadly}-done").write_text(str(step))
        os._exit(0)

    for deadly in itertools.count():
        child = os.fork()
        if child == 0:
            writer(deadly)
        _, status = os.waitpid(child, 0)
        done = tmp_path / f"{deadly}-done"
        finished = int(done.read_text()) if done.exists() else 0
        found = {}
        for number in range(2):
            area = Area(tmp_path / f"{deadly}-{number}")
            if (known := area.clean) is not None:
                assert area.damaged() == [] and set(area.payload()) == {known.step} and len(area.payload()) == size + known.step
                found[known.step] = area
        assert max(found, default=0) in (finished, finished + 1), deadly
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert deadly > 40 and finished == versions


def test_the_word_alone_does_not_make_an_area_clean(tmp_path):
    area = Area(tmp_path / "a")
    area.begin(header(1, 100))
    area.write(0, b"x" * 100)
    struct.pack_into("<Q", area._map, 8, CLEAN)
    assert area.state == CLEAN and area.clean is None


def test_a_flipped_byte_is_found_in_its_block(tmp_path):
    area = Area(tmp_path / "a")
    area.begin(header(1, 9 * 2**20))
    known = area.seal()
    flip(area.path, BODY + known.table + 5 * 2**20)
    assert area.damaged() == [1]
    flip(area.path, BODY + 3)
    assert area.clean is None, "a damaged digest condemns all of it"


def test_memory_that_is_full_is_said_before_anything_is_lost(tmp_path, monkeypatch):
    area = Area(tmp_path / "a")
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match=r"no room for a snapshot of 1 MiB .*CAIRN_MEMORY"):
        area.begin(header(1, 100))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("nodes", "size", "parity", "expected"),
    [
        ("abc", 8, 1, ["abc"]),
        ("aabb", 8, 1, ["02", "13"]),
        ("aaa", 8, 1, ["0", "1", "2"]),
        ("abcd", 2, 1, ["01", "23"]),
        ("abcd", 8, 0, ["0", "1", "2", "3"]),
        ("abcde", 3, 2, ["012", "3", "4"]),
    ],
)
def test_groups_never_have_two_members_on_one_node(nodes, size, parity, expected):
    expected = [list(range(len(nodes)))] if expected == [nodes] else [[int(rank) for rank in group] for group in expected]
    if nodes == "abcde":
        expected = [[0, 1, 2], [3], [4]]
    found = groups(list(nodes), size, parity)
    assert [group for rank, group in enumerate(found) if group[0] == rank] == expected
    assert all(rank in group and len({nodes[r] for r in group}) == len(group) for rank, group in enumerate(found))
