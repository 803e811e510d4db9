"""A keeper that goes: threads that still work in its areas end quietly, and what is being sealed is sealed first."""

import shutil
import threading
import time

import pytest

from cairn.checkpoint.memory import holding
from cairn.checkpoint.memory.area import CLEAN, Header
from cairn.checkpoint.memory.holding import Keeper
from cairn.checkpoint.memory.link import Settings


def keeper(folder) -> Keeper:
    (folder / "run").mkdir(parents=True)
    (folder / "memory").mkdir()
    return Keeper(Settings(run=str(folder / "run"), name="n-0", node="n", folder=str(folder / "memory"), slots=2, idle=10, address=None))


def begun(kept: Keeper, parity: int = 0) -> int:
    header = Header(step=1, attempt="a", member=0, members=2, group=[0, 1], parity=parity, size=100_000)
    return kept.begin(header, None)["slot"]


@pytest.fixture
def uncaught(monkeypatch):
    """What threads raise."""
    met = []
    monkeypatch.setattr(threading, "excepthook", lambda caught: met.append(caught.exc_value))
    return met


def settled() -> None:
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and thread.daemon and "_finish" in thread.name:
            thread.join(10)


def test_what_is_being_sealed_is_sealed_before_the_areas_go(tmp_path, uncaught):
    kept = keeper(tmp_path)
    number = begun(kept)
    kept.commit(number)
    kept.close()
    assert kept.data[number].state == CLEAN and not kept._committed
    shutil.rmtree(tmp_path / "memory")
    settled()
    assert not uncaught


def test_a_thread_that_protects_ends_as_its_area_is_taken_down(tmp_path, uncaught, monkeypatch):
    kept, inside = keeper(tmp_path), threading.Event()
    go = threading.Event()

    def share(keeper, number, header):
        inside.set()
        go.wait(10)
        keeper.parity[number].begin(header)  # the folder is gone by now
        return {}

    monkeypatch.setattr(holding, "_share", share)
    kept.commit(begun(kept, parity=1))
    assert inside.wait(10)
    kept.close(wait=0.1)
    shutil.rmtree(tmp_path / "memory")
    go.set()
    settled()
    assert not uncaught


def test_an_error_of_a_keeper_that_lives_is_not_hidden(tmp_path, uncaught, monkeypatch):
    kept = keeper(tmp_path)
    monkeypatch.setattr(holding, "_share", lambda *_: (_ for _ in ()).throw(OSError("lost")))
    kept.commit(begun(kept, parity=1))
    settled()
    assert [str(error) for error in uncaught] == ["lost"]


@pytest.mark.parametrize("sealed", [False, True])
def test_giving_up_takes_nothing_away_that_was_whole(tmp_path, uncaught, sealed):
    kept = keeper(tmp_path)
    number = begun(kept)
    kept.commit(number)
    if sealed:
        settled()
    kept.abort(number)
    settled()
    assert kept.data[number].state == CLEAN and not uncaught


def test_nothing_is_made_while_the_areas_go(tmp_path, uncaught, monkeypatch):
    """What is being encoded ends before `close` returns, so that a folder that is removed then stays removed."""
    kept, inside = keeper(tmp_path), threading.Event()

    def share(keeper, number, header):
        inside.set()
        time.sleep(0.2)
        keeper.parity[number].begin(header)
        return {}

    monkeypatch.setattr(holding, "_share", share)
    kept.commit(begun(kept, parity=1))
    assert inside.wait(10)
    kept.close()
    shutil.rmtree(tmp_path / "memory")
    settled()
    assert not (tmp_path / "memory").exists() and not uncaught
