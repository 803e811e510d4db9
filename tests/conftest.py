"""What every test shares: one thread, no network, a cache of its own, and the same examples each time."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest
from hypothesis import settings

# Before anything imports torch; child processes inherit all of it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
    os.environ.pop(name, None)

pytest_plugins = ["tests.fixtures"]

settings.register_profile("cairn", derandomize=True, deadline=None, database=None, print_blob=True)
settings.load_profile("cairn")

_CACHE = "CAIRN_TEST_CACHE"


def pytest_configure(config: pytest.Config) -> None:
    """One cache for the session: the first process makes it, xdist's workers inherit its name."""
    if _CACHE not in os.environ:
        os.environ[_CACHE] = tempfile.mkdtemp(prefix="cairn-tests-")
        config.add_cleanup(lambda folder=os.environ[_CACHE]: _remove(folder))
    os.environ["CAIRN_CACHE"] = os.environ[_CACHE]
    os.environ["CAIRN_STATE"] = os.path.join(os.environ[_CACHE], "state")


def _remove(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.environ.pop(_CACHE, None)
