"""A save is queued in one act or not at all, a thread that fails leaves nobody waiting, and a save without a copy is the same checkpoint."""

import threading
import time

import pytest
import torch

from cairn.checkpoint.format import read, verify
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.saving.capture import Background
from cairn.checkpoint.saving.captured import NamedState
from cairn.checkpoint.saving.peers import Peers
from cairn.errors import InputError, WorkerError


def state() -> NamedState:
    generator = torch.Generator().manual_seed(0)
    return NamedState({"model": {f"w{n}": torch.randn(300, 200, generator=generator) for n in range(4)}}, {"config.json": b"{}"})


def lineage(parent):
    return Lineage.record("run", "train", parents=[parent] if parent else [])


def closes(saver: Background, within: float = 20) -> bool:
    thread = threading.Thread(target=saver.close, daemon=True)
    thread.start()
    thread.join(within)
    return not thread.is_alive()


class Interrupting:
    """A queue in whose hands the caller is interrupted, before or after it has taken what it was given."""

    def __init__(self, inner, moment: str) -> None:
        self.inner, self.moment = inner, moment

    def put(self, item) -> None:
        if item is None:
            self.inner.put(None)
        elif self.moment == "before":
            raise KeyboardInterrupt
        else:
            self.inner.put(item)
            raise KeyboardInterrupt

    def get(self):
        return self.inner.get()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_while_a_save_is_queued_leaves_nobody_waiting(tmp_path, moment):
    saver = Background(mode="lazy")
    honest = saver._copies
    saver._copies = Interrupting(honest, moment)
    with pytest.raises(KeyboardInterrupt):
        saver.save(tmp_path / "a", state(), lineage)
    saver._copies = honest
    assert closes(saver)
    assert (tmp_path / "a").exists() == (moment == "after") and not list(tmp_path.glob(".writing-*"))


def test_a_thread_that_fails_in_an_unforeseen_way_ends_the_save_and_says_so(tmp_path, monkeypatch):
    saver = Background(mode="lazy")
    monkeypatch.setattr(saver, "_fetch", lambda *_: (_ for _ in ()).throw(ZeroDivisionError("unforeseen")))
    saver.save(tmp_path / "a", state(), lineage)
    with pytest.raises(ZeroDivisionError, match="unforeseen"):
        saver.finish()
    assert closes(saver) and not (tmp_path / "a").exists()


def test_without_a_copy_the_checkpoint_is_the_same_and_is_there_at_once(tmp_path):
    with Background(mode="lazy") as saver:
        saver.save(tmp_path / "copied", state(), lineage)
    with Background(mode="off") as saver:
        done = saver.save(tmp_path / "live", state(), lineage)
        assert done.is_set() and verify.verify(tmp_path / "live").sound and saver._ring is None
        assert saver.newest.digest == read.open(tmp_path / "copied").digest
        with pytest.raises(InputError, match="exclude each other"):
            saver.save(tmp_path / "kept", state(), lineage, keep=lambda specs, parts: None)


class Two(Peers):
    """One of two processes; what the other says is given."""

    size = 2

    def __init__(self, rank: int, other) -> None:
        self.rank, self._other = rank, other

    def gather(self, item):
        return [item, self._other] if self.rank == 0 else [self._other, item]


def test_an_error_that_is_not_ours_reaches_the_other_processes_at_once():
    """The one that fails raises what it met; the others are told which process failed, and of what."""
    told = []
    failing = Two(1, None)
    failing.gather = lambda item: told.append(item) or [None, item]
    with pytest.raises(ZeroDivisionError):
        failing.together(lambda: 1 / 0)
    began = time.monotonic()
    with pytest.raises(WorkerError, match="Process 1 has failed: ZeroDivisionError: division by zero"):
        Two(0, told[0]).together(lambda: None)
    assert time.monotonic() - began < 1
