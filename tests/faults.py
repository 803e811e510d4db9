"""Fault injection: real processes that die at chosen or random moments, disks that fill up, bytes that flip."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def python(code: str, *arguments: str, **environment: str) -> subprocess.Popen:
    """A Python process that runs `code`."""
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def cairn(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the command line to its end."""
    return subprocess.run([sys.executable, "-m", "cairn", *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=240)


def torchrun(processes: int, script: Path, *arguments: str) -> None:
    """Run a script in several gloo processes; what they said is in the error if one fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def kill_when(process: subprocess.Popen, ready: Callable[[], bool], within: float = 120) -> bool:
    """SIGKILL the process as soon as `ready()`; whether it was still alive then."""
    end = time.monotonic() + within
    while process.poll() is None and time.monotonic() < end:
        if ready():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.001)
    process.wait(timeout=10)
    return False


def flip(path: Path, position: int) -> None:
    """Change one byte of a file in place."""
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 0xFF]))


def moments(seed: int, count: int, longest: float) -> list[float]:
    """Random moments, the same for the same seed."""
    chooser = random.Random(seed)
    return [chooser.uniform(0, longest) for _ in range(count)]
