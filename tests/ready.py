"""Child processes that begin with torch and cairn imported.

Importing takes seconds of a processor, a test that starts three processes pays it three times, and the suite has hundreds of
them. A server imports once (multiprocessing's `forkserver`, one for each process of pytest), and every child is forked from
it: a process of its own, which signals, limits and locks see as any other, with the environment, the folder and the arguments
that it is given. What is about starting itself (launchers, import times, other environments) starts real interpreters.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch._inductor.config", "torch.distributed.tensor", "torch.distributed.fsdp", "cairn.cli.main", "cairn.training.run"]
)


class Child:
    """What `subprocess.Popen` is to a program: `pid`, `returncode`, `poll`, `wait`, `send_signal`, `kill`, `communicate`."""

    def __init__(self, act: str, what: str, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="cairn-child-")
        self._said = [Path(self._folder.name) / name for name in ("out", "err")]
        child = (act, what, list(arguments), environment, os.getcwd(), [str(path) for path in self._said])
        self._process = SERVER.Process(target=_child, args=child)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("a child of a test", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it said on both streams."""
        self.wait(timeout)
        out, err = ((path.read_text() if path.exists() else "") for path in self._said)
        return out, err

    def line(self, within: float = 60) -> str:
        """The first line that it says on stdout."""
        end = time.monotonic() + within
        while time.monotonic() < end:
            text = self._said[0].read_text() if self._said[0].exists() else ""
            if "\n" in text or self.poll() is not None:
                return text.partition("\n")[0]
            time.sleep(0.005)
        raise subprocess.TimeoutExpired("a child of a test", within)


def _child(act: str, what: str, arguments: list[str], environment: dict[str, str], folder: str, said: list[str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for fd, path in enumerate(said, 1):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, fd)
        os.close(opened)
    sys.argv = [what, *arguments]
    if act == "code":
        sys.argv[0] = "-c"
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(what, "<code of a test>", "exec"), names)
    elif act == "module":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(what, run_name="__main__")


def code(text: str, *arguments: str, **environment: str) -> Child:
    """A process that runs Python code, as `python -c` does."""
    return Child("code", text, arguments, os.environ | environment)


def cairn(*arguments: str, **environment: str) -> Child:
    """A process of the command line, as `python -m cairn` is."""
    return Child("module", "cairn", arguments, os.environ | environment)


def ranks(processes: int, script: Path, *arguments: str, within: float = 240) -> None:
    """Run a script in several gloo processes, as `torchrun` does; what they said is in the error if one fails."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    started = [Child("path", str(script), arguments, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(processes)]
    end = time.monotonic() + within
    while any(child.poll() is None for child in started):
        if any(child.poll() for child in started) or time.monotonic() > end:  # the others would wait for it
            time.sleep(1.0)
            for child in started:
                child.kill()
        time.sleep(0.01)
    said = "\n".join(f"-- process {rank}\n{child.communicate()[1]}" for rank, child in enumerate(started))
    assert all(child.returncode == 0 for child in started), said
