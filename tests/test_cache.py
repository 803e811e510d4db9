"""The cache: contents decide, leftovers are swept, and what somebody works on stays."""

import os
import signal
import subprocess
import sys
import time

import pytest

from cairn import cache


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("CAIRN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_contents_decide_and_neither_names_nor_times(tmp_path, home):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"same")
    two.write_bytes(b"same")
    assert cache.contents([one]) == cache.contents([two])
    before, times = cache.contents([one]), one.stat()
    one.write_bytes(b"else")
    os.utime(one, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert one.stat().st_size == times.st_size and one.stat().st_mtime_ns == times.st_mtime_ns and cache.contents([one]) != before
    assert cache.contents([one, two]) != cache.contents([two, one])


def test_a_digest_is_remembered_until_the_file_is_touched(tmp_path, home, monkeypatch):
    path = tmp_path / "one"
    path.write_bytes(b"a")
    monkeypatch.setattr(cache, "_RACY", -1.0)
    first = cache.contents([path])
    (kept,) = (home / "contents").iterdir()
    kept.write_text("remembered")
    assert cache.contents([path]) == "remembered"
    times = path.stat()
    time.sleep(0.03)  # the clock of a file system ticks
    path.write_bytes(b"b")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert cache.contents([path]) not in ("remembered", first), "what was touched is read again, whatever its times were set to"


def test_what_was_touched_just_now_is_not_remembered(tmp_path, home):
    (tmp_path / "one").write_bytes(b"a")
    cache.contents([tmp_path / "one"])
    assert not (home / "contents").exists() or not list((home / "contents").iterdir())


FILL = """
import sys, time
from pathlib import Path
from cairn import cache

def fill(folder):
    (folder / "part").write_text("half")
    print("filling", flush=True)
    time.sleep(60)

cache.publish(Path(sys.argv[1]), fill)
"""


def filling(path):
    process = subprocess.Popen([sys.executable, "-c", FILL, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "filling\n"
    return process


def hidden(folder):
    return sorted(path.name for path in folder.glob(".*"))


def test_leftovers_of_the_killed_are_swept_and_the_work_of_the_living_stays(tmp_path, home):
    place = home / "tokens"
    killed, living = filling(place / "killed"), filling(place / "living")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    try:
        assert len(hidden(place)) == 2
        cache.publish(place / "third", lambda folder: (folder / "whole").write_text("x"))
        assert [name[:7] for name in hidden(place)] == [".living"], "in the cache, leftovers of any name"
    finally:
        living.kill()
        living.wait()
    cache.publish(place / "fourth", lambda folder: None)
    assert hidden(place) == []


def test_outside_the_cache_only_leftovers_of_the_same_name_are_swept(tmp_path, home):
    killed = filling(tmp_path / "store")
    killed.kill()
    killed.wait()
    for kept in (".other-0123abcd", ".store-notes"):
        (tmp_path / kept).mkdir()
    cache.publish(tmp_path / "store", lambda folder: None)
    assert hidden(tmp_path) == [".other-0123abcd", ".store-notes"] and (tmp_path / "store").is_dir()


def test_a_publication_that_fails_leaves_nothing(tmp_path, home):
    def fill(folder):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.publish(tmp_path / "store", fill)
    assert hidden(tmp_path) == [] and not (tmp_path / "store").exists()
