"""Fault injection: real processes that die at chosen or random moments, disks that fill up, bytes that flip."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests import ready


def python(code: str, *arguments: str, **environment: str) -> ready.Child:
    """A Python process that runs `code`."""
    return ready.code(code, *arguments, **environment)


def cairn(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the command line to its end."""
    child = ready.cairn(*arguments, **environment)
    out, err = child.communicate(timeout=240)
    return subprocess.CompletedProcess(["cairn", *arguments], child.returncode, out, err)


def torchrun(processes: int, script: Path, *arguments: str) -> None:
    """Run a script in several gloo processes; what they said is in the error if one fails."""
    ready.ranks(processes, script, *arguments)


def kill_when(process: subprocess.Popen | ready.Child, when: Callable[[], bool], within: float = 120) -> bool:
    """SIGKILL the process as soon as `when()`; whether it was still alive then."""
    end = time.monotonic() + within
    while process.poll() is None and time.monotonic() < end:
        if when():
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
