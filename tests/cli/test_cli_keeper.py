"""`cairn keeper` and `cairn survival`."""

import signal

import pytest

from cairn.checkpoint.format import verify
from cairn.studies.nodes import Fault, NodeJob


@pytest.fixture
def job(small_recipe, tmp_path, monkeypatch):
    """A run whose trainer died after step 9, with snapshots every 2 steps."""
    with NodeJob(tmp_path / "r", 1, ["fault_tolerance.memory.every=2"]) as made:
        monkeypatch.setenv("CAIRN_NODE", "node-0")
        monkeypatch.setenv("CAIRN_MEMORY", str(made.memory(0)))
        made.start(small_recipe | {"checkpoint": {"every": "100 steps"}}, Fault(0, "update", 10))
        assert not made.finish() and made.ended == [-signal.SIGKILL]
        yield made


def test_status_persist_and_stop(cairn, job, tmp_path):
    found = cairn("keeper", "status", job.run, "--json").document
    assert found["newest"] == 8 and [keeper["steps"] for keeper in found["keepers"]] == [[6, 8]] and not found["keepers"][0]["trainer"]
    shown = cairn("keeper", "status", job.run)
    assert shown.status == 0 and "node-0-0" in shown.out and "gone" in shown.out and "newest state that is whole: 8" in shown.out

    saved = cairn("keeper", "persist", job.run, "-o", tmp_path / "rescue", "--json").document
    assert saved["step"] == 8 and verify.verify(tmp_path / "rescue").sound
    again = cairn("keeper", "persist", job.run, "-o", tmp_path / "rescue")
    assert again.status == 2 and "never overwritten" in again.err

    stopped = cairn("keeper", "stop", job.run, "--json").document
    assert stopped["stopped"] == 1 and cairn("show", stopped["checkpoint"], "--json").document["digest"] == saved["digest"]
    assert cairn("keeper", "stop", tmp_path / "rescue").status == 2


def test_a_run_without_keepers_is_said(cairn, small_run):
    for command in ("status", "stop"):
        answer = cairn("keeper", command, small_run.path)
        assert answer.status == 2 and "has no keepers; fault_tolerance.memory.every=5" in answer.err and answer.out == ""
    answer = cairn("keeper", "persist", small_run.path)
    assert answer.status == 2 and "no state that is whole; the newest on disk is step-00000020" in answer.err


def test_survival(cairn, tmp_path):
    found = cairn("survival", 48, "group=6", "mtbf=1188", "hours=24", "--picture", tmp_path / "s.png", "--json").document
    assert found["lost_with_keepers_alone"] == pytest.approx(1 - 0.379, abs=2e-3) and found["lost_with_parity"] == pytest.approx(1 - 0.9554, abs=5e-4)
    assert (tmp_path / "s.png").exists()
    shown = cairn("survival", 48)
    assert "These figures assume" in shown.out and "independently" in shown.out
    answer = cairn("survival", 48, "mtbff=3")
    assert answer.status == 2 and "Did you mean 'mtbf'" in answer.err
