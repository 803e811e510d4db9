"""What a step frees is kept for the next one: after the first step no page comes from the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from cairn.training import allocator
from cairn.training.run import train

STEPS = """
import resource, torch
from cairn.training import allocator
torch.set_num_threads(1)
assert not {keep} or allocator.keep()
def step():
    big, small = torch.ones(24 * 2**20 // 4), [torch.ones(3 * 2**20 // 4) for _ in range(20)]
    return big, torch.cat(small)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 5)
"""


def faults(keep: bool) -> float:
    return float(subprocess.run([sys.executable, "-c", STEPS.format(keep=keep)], capture_output=True, text=True, check=True).stdout)


def test_a_step_takes_no_new_pages() -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library than glibc keeps its own rules")
    assert faults(True) < 1000 < 5000 < faults(False)  # 144 MB are 36864 pages


def test_training_keeps_memory(small_recipe, tmp_path, monkeypatch) -> None:
    called = []
    monkeypatch.setattr(allocator, "keep", lambda: called.append(True))
    train(small_recipe, tmp_path / "r", stop_at_step=1)
    assert called == [True]
