"""Everything pluggable is found by name, once, with its nearest neighbour named when it is not."""

import subprocess
import sys

import pytest

from cairn import catalog
from cairn.errors import NotFoundError


@pytest.mark.parametrize("kind", sorted(catalog.KINDS))
def test_every_kind_has_members_that_say_what_they_are(kind):
    entries = catalog.entries(kind)
    assert entries
    for entry in entries:
        assert entry.summary and len(entry.summary) < 200, entry.name
        assert entry.group == catalog.KINDS[kind].group


def test_the_nearest_name_is_suggested():
    with pytest.raises(NotFoundError, match="Did you mean 'cosine'"):
        catalog.get("schedule", "cosin")
    with pytest.raises(NotFoundError, match="Did you mean 'operation'"):
        catalog.entries("operatoin")


def test_a_name_can_be_taken_only_once():
    with pytest.raises(ValueError, match="registered twice"):

        @catalog.register("schedule", "cosine")
        class Other:
            """Another one."""


def test_one_method_is_found_without_importing_its_neighbours():
    code = (
        "import sys; from cairn import catalog; catalog.get('schedule', 'wsd');"
        "assert 'cairn.training.schedules.cosine' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
