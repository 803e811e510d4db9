"""Everything pluggable is found by name, once, with its nearest neighbour named when it is not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from cairn import catalog
from cairn.describing import OptionRow, described
from cairn.errors import NotFoundError
from cairn.options import Options, configure


@pytest.mark.parametrize("kind", sorted(catalog.KINDS))
def test_every_kind_has_members_that_say_what_they_are(kind):
    entries = catalog.entries(kind)
    assert entries
    for entry in entries:
        assert entry.summary and len(entry.summary) < 200, entry.name
        assert entry.group == catalog.KINDS[kind].group


def test_every_kind_has_a_parent_that_stands_for_it():
    assert set(catalog.PARENTS) == set(catalog.KINDS)


@pytest.mark.parametrize("kind", sorted(catalog.PARENTS))
def test_every_method_is_a_child_of_its_kinds_parent(kind):
    parent = catalog.parent(kind)
    assert parent.catalog_kind == kind and {*catalog.entries(parent)} <= {*catalog.entries(kind)}
    for entry in catalog.entries(parent):
        assert issubclass(entry.implementation, parent) and catalog.get(parent, entry.name) == entry
        assert configure(parent, entry.name).__class__ is entry.implementation if _has_defaults(entry.implementation) else True


def _has_defaults(options) -> bool:
    return all(not field.is_required() for field in options.model_fields.values())


def test_the_nearest_name_is_suggested():
    with pytest.raises(NotFoundError, match="Did you mean 'cosine'"):
        catalog.get("schedule", "cosin")
    with pytest.raises(NotFoundError, match="Did you mean 'operation'"):
        catalog.entries("operatoin")


def test_a_name_can_be_taken_only_once_and_only_by_a_child_of_the_parent():
    from cairn.training.schedules import Schedule

    with pytest.raises(ValueError, match="registered twice"):
        catalog.get("schedule", "cosine").implementation  # noqa: B018  (imported, so that its name is taken)

        @catalog.register("schedule", "cosine")
        class Other(Schedule):
            """Another one."""

    with pytest.raises(ValueError, match=r"no child of cairn\.training\.schedules:Schedule"):

        @catalog.register("schedule", "no-schedule")
        class Stranger:
            """No schedule."""


def test_one_method_is_found_without_importing_its_neighbours():
    code = (
        "import sys; from cairn import catalog; catalog.get('schedule', 'wsd').implementation;"
        "assert 'cairn.training.schedules.cosine' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_listing_everything_imports_nothing():
    code = (
        "import sys; from cairn import catalog; assert len(catalog.entries()) > 50;"
        "assert not {'torch', 'numpy', 'pydantic', 'cairn.training', 'cairn.merging'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_method_that_the_index_does_not_know_yet_is_found(monkeypatch):
    lacking = json.loads(Path(catalog.__file__).with_name(catalog.INDEX).read_bytes())
    for part in ("modules", "entries"):
        lacking["schedule"][part] = [each for each in lacking["schedule"][part] if "wsd" not in str(each)]
    code = f"from cairn import catalog; catalog._index = lambda: {lacking!r}; assert 'wsd' in catalog.names('schedule'); assert catalog.has('schedule', 'wsd')"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def other_package(tmp_path):
    """A package that is no part of cairn, as pip leaves one behind: a module that registers a schedule, and its entry point."""
    (tmp_path / "pebble.py").write_text(
        "from cairn.catalog import Paper, register\n"
        "from cairn.training.schedules import Schedule\n\n\n"
        '@register("schedule", "pebble", paper=Paper("On pebbles", "doi:10.0/0"))\n'
        "class Pebble(Schedule):\n"
        '    """Half of the rate, always."""\n\n'
        "    share: float = 0.5\n\n"
        "    def shape(self, tokens, horizon):\n"
        "        return self.share\n"
    )
    info = tmp_path / "pebble-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pebble\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[{catalog.ENTRY_POINTS}]\npebble = pebble\n")
    return tmp_path


def in_python(code: str, folder: Path) -> str:
    program = f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


def test_another_package_registers_a_method(other_package):
    said = in_python(
        "from cairn import catalog\n"
        "from cairn.training.recipe import load\n"
        "assert 'pebble' in catalog.names('schedule')\n"
        "recipe = load('demo', ['schedule=pebble', 'schedule.share=0.25'])\n"
        "print(recipe.schedule.pinned(10, 100).factor(50, 10), recipe.model_dump(mode='json')['schedule']['name'])\n"
        "import sys; sys.argv = ['cairn', 'catalog', 'schedule']\n"
        "from cairn.cli.main import main\n"
        "main()",
        other_package,
    )
    assert said.startswith("0.25 pebble") and "Half of the rate, always." in said and "On pebbles" in said


def test_another_package_that_cannot_be_loaded_is_named_where_its_method_is_missed(other_package):
    (other_package / "pebble.py").write_text("import no_such_module\n")
    said = in_python(
        "from cairn import catalog\n"
        "assert catalog.get('schedule', 'cosine').implementation\n"
        "try: catalog.get('schedule', 'pebble')\n"
        "except catalog.NotFoundError as error: print(error)\n"
        "print(catalog.failures())",
        other_package,
    )
    assert "'pebble' could not be loaded: ModuleNotFoundError: No module named 'no_such_module'." in said


@pytest.mark.parametrize("entry", catalog.entries(), ids=lambda entry: f"{entry.kind} {entry.name}")
def test_every_option_is_told_with_its_type_and_default(entry):
    rows = described(entry.implementation)
    assert [row.name for row in rows] == [field.alias or name for name, field in entry.implementation.model_fields.items()]
    assert all(row.type and "cairn." not in row.type and "Annotated" not in row.type and row.default != "" for row in rows)


def test_what_stands_below_an_option_is_told_and_a_childs_word_counts():
    class Parent(Options):
        """Given."""

        a: int = 3
        """The first."""
        b: Literal["x", "y"] | None = None

    class Child(Parent):
        """More."""

        a: int
        """Another first."""

    assert described(Parent) == [OptionRow("a", "int", "3", "The first."), OptionRow("b", "x | y | None", "None", "")]
    assert described(Child)[0] == OptionRow("a", "int", None, "Another first.")
