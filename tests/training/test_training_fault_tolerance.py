"""Runs whose processes and nodes really die: they go on from memory, on fewer nodes or the same, and end with the same bits."""

import json
import os
import shutil
import signal
import time

import pytest

from cairn.checkpoint.format import read, verify
from cairn.checkpoint.memory import attend, link
from cairn.checkpoint.memory.area import Area
from cairn.checkpoint.memory.plan import find
from cairn.studies.nodes import Fault, NodeJob, kill_process
from cairn.training.run import Run, resume, train
from tests import faults

EVERY = "fault_tolerance.memory.every=2"


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A run of one process on a node of its own; this process is on the same node, and may resume it itself."""
    with NodeJob(tmp_path / "r", 1, [EVERY]) as made:
        monkeypatch.setenv("CAIRN_NODE", "node-0")
        monkeypatch.setenv("CAIRN_MEMORY", str(made.memory(0)))
        yield made


@pytest.fixture
def recipe(small_recipe):
    """Nothing on disk but the beginning and the end."""
    return small_recipe | {"checkpoint": {"every": "100 steps"}}


def losses(run):
    return [row["loss"] for row in run.metrics()]


def dies_at(job, step, recipe=None, settings=()):
    """The trainer is killed in the update after `step`; it resumes where there is no recipe."""
    job.start(recipe, Fault(0, "update", step + 1), settings)
    assert not job.finish() and job.ended == [-signal.SIGKILL] and job.step() == step


def held(job):
    """The areas of snapshots in the memory of the job's node."""
    return sorted((Area.open(path) for path in job.memory(0).rglob("data-*")), key=lambda area: area.header.step, reverse=True)


def test_a_killed_run_goes_on_from_memory_and_changes_no_bit(job, recipe, small_run):
    run = job.run
    dies_at(job, 9, recipe)
    assert read.open(run).step == 0, "there is nothing on disk but the beginning"
    assert attend.status(run)["newest"] == 8

    # The keeper dies too: its memory does not, and the next one finds it.
    home = next(iter(link.homes(run).values()))
    kill_process(home.pid)
    assert find(run) is None
    assert link.start(link.Settings(run=str(run), name=home.name, node=home.node, folder=home.folder)).pid != home.pid
    assert find(run).version.step == 8

    dies_at(job, 13)
    assert [row["step"] for row in Run(run).metrics()] == list(range(1, 14))
    again = resume(run)
    assert losses(again) == losses(small_run) and again.newest().digest == small_run.newest().digest
    end = time.monotonic() + 30
    while (link.homes(run) or held(job)) and time.monotonic() < end:
        time.sleep(0.05)
    assert link.homes(run) == {} and held(job) == [], "a run that has ended leaves nothing in memory"


def test_a_keeper_that_dies_is_started_again_and_says_so(job, recipe, tmp_path):
    longer = ["training.tokens=100 steps", "schedule.horizon=20 steps"]
    job.start(recipe, None, longer)
    assert job.when(lambda: job.step() >= 5)
    kill_process(next(iter(link.homes(job.run).values())).pid)
    assert job.finish(), (tmp_path / "r-trainer-0.log").read_text()
    assert losses(Run(job.run)) == losses(train(recipe, tmp_path / "plain", longer))
    assert len(list((job.run / link.KEEPERS).glob("*.log"))) == 1


def test_a_keeper_asked_to_stop_writes_what_it_holds(job, recipe, small_run, tmp_path):
    run = job.run
    dies_at(job, 9, recipe)
    pid = next(iter(link.homes(run).values())).pid
    os.kill(pid, signal.SIGTERM)
    waited(lambda: link.homes(run) == {})
    saved = read.open(run)
    direct = train(recipe, tmp_path / "direct", stop_at_step=8).newest()
    assert saved.step == 8 and verify.verify(saved.path).sound and saved.digest == direct.digest
    assert held(job) == []
    assert losses(resume(run)) == losses(small_run)


def waited(so, within=60):
    end = time.monotonic() + within
    while not so() and time.monotonic() < end:
        time.sleep(0.02)
    assert so()


def test_a_keeper_that_nobody_needs_writes_and_leaves(job, recipe):
    run = job.run
    dies_at(job, 5, recipe, ["fault_tolerance.memory.idle=1"])
    waited(lambda: link.homes(run) == {})
    assert read.open(run).step == 4 and held(job) == []


def test_a_keeper_whose_run_is_deleted_leaves(job, recipe):
    dies_at(job, 3, recipe)
    assert len(held(job)) == 2
    shutil.rmtree(job.run)
    waited(lambda: held(job) == [])


def test_damaged_memory_is_passed_over_for_the_version_before_and_then_for_the_disk(job, recipe, small_run):
    run = job.run
    dies_at(job, 9, recipe)
    for area, left in zip(held(job), (6, None), strict=True):
        faults.flip(area.path, 4096 + area.header.table + 100)
        plan = find(run)
        assert (plan.version.step if plan is not None else None) == left
    assert losses(resume(run)) == losses(small_run)


def test_the_last_step_is_saved_even_if_it_comes_back_from_memory(job, recipe, small_run):
    dies_at(job, 19, recipe)
    job.start(None, Fault(0, "saving", 20))
    assert not job.finish() and job.ended == [-signal.SIGKILL] and read.open(job.run).step == 0 and find(job.run).version.step == 20
    again = resume(job.run)
    assert again.newest().step == 20 and again.newest().digest == small_run.newest().digest


def test_parity_that_one_machine_can_not_give_is_said(recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("CAIRN_MEMORY", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    settings = [EVERY, "fault_tolerance.memory.parity=1", "training.tokens=4 steps"]
    done = faults.cairn("train", str(tmp_path / "recipe.yaml"), *settings, "--run", str(tmp_path / "r"))
    assert done.returncode == 0 and "parity 1 needs a group of more nodes than this run has (1)" in " ".join(done.stderr.split())


def test_nodes_die_and_the_job_goes_on_with_the_same_bits_and_then_on_fewer(small_recipe, tmp_path):
    """Killed while writing, in an update, with its node; two nodes at once; and three nodes become two."""
    recipe = small_recipe | {
        "training": {"tokens": "20 steps", "batch": 6 * 32, "precision": "float64", "compile": False},
        "checkpoint": {"every": "100 steps"},
    }
    with NodeJob(tmp_path / "whole", 3) as whole:
        whole.start(recipe)
        assert whole.finish()
    settings = [EVERY, "fault_tolerance.memory.parity=1"]
    with NodeJob(tmp_path / "run", 3, settings) as job:
        job.start(recipe, Fault(1, "writing", 6))
        assert not job.finish() and job.ended[1] == -signal.SIGKILL and job.step() == 6 and find(job.run).version.step == 4
        job.start(None, Fault(2, "update", 11))
        assert not job.finish() and job.ended[2] == -signal.SIGKILL and job.step() in (10, 11), "others may finish what node 2 did not"
        job.lose(0)
        plan = find(job.run)
        assert plan.version.step == 10 and plan.lost == [0]
        shutil.copytree(tmp_path / "run", tmp_path / "smaller")
        job.start(None)
        assert job.finish()
        assert Run(job.run).newest().digest == Run(whole.run).newest().digest and losses(Run(job.run)) == losses(Run(whole.run))

    # The same death, but only two nodes come back; they hold the memory of nodes 1 and 2 of the same run.
    with NodeJob(tmp_path / "again", 3, settings) as job:
        job.start(recipe, Fault(2, "update", 11))
        assert not job.finish()
        job.lose(2)
        assert find(job.run).version.step == 10
        smaller = NodeJob(job.run, 2, settings)
        smaller.start(None, Fault(1, "update", 15))
        assert not smaller.finish() and smaller.step() in (14, 15)
        assert find(job.run).members == 2 and find(job.run).version.step == 14
        job.lose(0)
        job.lose(1)
        assert find(job.run) is None and read.open(job.run).step == 0, "two nodes at once: nothing partial, the disk is what there is"
        smaller.start(None)
        assert smaller.finish()
        assert losses(Run(job.run)) == pytest.approx(losses(Run(whole.run)), rel=1e-9)
