"""Processes that are started, interrupted and lost: statuses and sentences, no tracebacks."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from cairn.checkpoint.format import read
from cairn.errors import InputError, WorkerError
from cairn.training import loggers
from cairn.training import recipe as recipes
from cairn.training.directory import OWNER
from cairn.training.parallel import World, explained, joined
from cairn.training.recipe import started_processes
from tests import faults


def written(recipe: dict, folder) -> str:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return str(folder / "recipe.yaml")


@pytest.mark.parametrize(("number", "whole_group"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_an_interrupt_of_two_processes_saves_and_leaves_with_130(small_recipe, small_run, tmp_path, number, whole_group):
    """Ctrl-C reaches launcher and workers; a termination the launcher alone."""
    run = tmp_path / "r"
    words = ["training.tokens=3000 steps", "schedule.horizon=20 steps", "checkpoint.every=1000 steps", "parallel.data=2", "training.micro_batch=64"]
    command = [sys.executable, "-m", "cairn", "train", written(small_recipe, tmp_path), *words, "--run", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and len(list(loggers.read_rows(run / loggers.METRICS))) < 3:
        time.sleep(0.05)
    os.killpg(process.pid, number) if whole_group else process.send_signal(number)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in error and "go on with: cairn resume" in error, error
    step = read.open(run).step
    assert step == list(loggers.read_rows(run / loggers.METRICS))[-1]["step"] < 3000


def test_workers_end_with_a_launcher_that_is_killed(small_recipe, tmp_path):
    """They save, leave the run to the next one, and do not train on unseen."""
    run = tmp_path / "r"
    words = ["training.tokens=3000 steps", "schedule.horizon=20 steps", "checkpoint.every=1000 steps", "parallel.data=2", "training.micro_batch=64"]
    process = subprocess.Popen([sys.executable, "-m", "cairn", "train", written(small_recipe, tmp_path), *words, "--run", str(run)], stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(loggers.read_rows(run / loggers.METRICS))) < 3:
        time.sleep(0.05)
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while (run / OWNER).exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not (run / OWNER).exists()
    assert read.open(run).step == list(loggers.read_rows(run / loggers.METRICS))[-1]["step"] < 3000


def test_a_divergence_of_two_processes_has_its_own_status(small_recipe, tmp_path):
    recipe = {**small_recipe, "optimizer": {"name": "adamw", "lr": 1e30}, "training": {**small_recipe["training"], "clip": None}}
    done = faults.cairn("train", written(recipe, tmp_path), "parallel.data=2", "schedule=constant", "--run", str(tmp_path / "r"))
    assert done.returncode == 1 and "stopped before the update" in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("text", ["", "1"])
def test_an_empty_world_size_is_one_process(small_recipe, monkeypatch, text):
    monkeypatch.setenv("WORLD_SIZE", text)
    assert started_processes() == 1
    with joined(recipes.load(small_recipe)) as world:
        assert world.size == 1


@pytest.mark.parametrize("text", ["two", "0", "-1", "1.5"])
def test_a_world_size_that_is_no_number_is_refused(small_recipe, tmp_path, text):
    done = faults.cairn("train", written(small_recipe, tmp_path), "--run", str(tmp_path / "r"), WORLD_SIZE=text)
    assert done.returncode == 2 and f"WORLD_SIZE is '{text}'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_too_little_memory_is_answered_with_the_remedy(error):
    with pytest.raises(InputError, match=r"not enough memory.*training\.micro_batch=512"), explained(World(), None, 1024):
        raise error


def test_a_lost_process_is_said_and_other_errors_are_not_hidden():
    with pytest.raises(WorkerError, match="has lost another process"), explained(World(0, 2), None, 64):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242")
    with pytest.raises(RuntimeError, match="shapes"), explained(World(0, 2), None, 64):
        raise RuntimeError("shapes do not fit")


def test_groups_made_inside_a_process_group_go_with_the_run(small_recipe, tmp_path):
    """train() inside a group that others go on using leaves no group of its own behind."""
    script = tmp_path / "inside.py"
    script.write_text(
        "import json, sys\n"
        "import torch.distributed as dist\n"
        "from cairn.training.run import train\n"
        "dist.init_process_group('gloo')\n"
        "before = len(dist.distributed_c10d._world.pg_map)\n"
        "train(json.loads(sys.argv[1]), sys.argv[2])\n"
        "assert len(dist.distributed_c10d._world.pg_map) == before, dist.distributed_c10d._world.pg_map\n"
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
    )
    import json

    recipe = {**small_recipe, "parallel": {"data": 2}, "training": {**small_recipe["training"], "tokens": "2 steps"}}
    faults.torchrun(2, script, json.dumps(recipe), str(tmp_path / "r"))
    assert read.open(tmp_path / "r").step == 2
