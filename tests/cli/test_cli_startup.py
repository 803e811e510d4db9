"""Commands that do not compute start fast: torch is not loaded by them."""

import resource
import subprocess
import sys

import pytest


def loaded(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after `code`."""
    program = f"{code}\nimport sys; print(' '.join(sorted({{name.partition('.')[0] for name in sys.modules}})), file=sys.__stderr__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


HEAVY = {"torch", "transformers", "datasets", "matplotlib", "pyarrow", "scipy"}


def test_importing_the_package_loads_next_to_nothing():
    assert not loaded("import cairn") & {*HEAVY, "numpy", "pydantic", "typer", "rich", "yaml"}


@pytest.mark.parametrize("module", ["cairn.cli.main", "cairn.training.recipe", "cairn.training.estimate", "cairn.checkpoint.format.read", "cairn.data.corpora"])
def test_modules_of_the_front_hall_do_not_load_torch(module):
    assert not loaded(f"import {module}") & HEAVY


def run(*arguments: object) -> str:
    return f"import sys; sys.argv = {['cairn', *map(str, arguments)]!r}\nfrom cairn.cli.main import main\ntry: main()\nexcept SystemExit: pass"


@pytest.mark.parametrize("arguments", [["--help"], ["catalog"], ["catalog", "operation"], ["train", "dmas-1.7b", "--dry-run"], ["data", "list"]], ids=" ".join)
def test_commands_that_only_tell_do_not_load_torch(arguments):
    assert not loaded(run(*arguments)) & HEAVY


@pytest.mark.parametrize("command", ["show", "log", "verify"])
def test_looking_at_a_checkpoint_does_not_load_torch(small_run, command):
    assert not loaded(run(command, small_run.path)) & HEAVY


def fastest(code: str, times: int = 5) -> float:
    """Least seconds of a processor that several fresh interpreters take, without those of an empty one: what else runs beside counts little."""

    def once(program: str) -> float:
        began = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime

    return min(once(code) for _ in range(times)) - min(once("pass") for _ in range(times))


def test_start_takes_no_time_worth_noticing():
    """0.3 s and 0.5 s are promised; the double is allowed to a processor that several processes share."""
    assert fastest("import cairn") < 0.6
    assert fastest(run("--help")) < 1.0
    assert fastest(run("catalog")) < 1.0
