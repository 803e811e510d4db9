"""Pictures are drawn in one place, and no drawing leaves a trace in matplotlib's shared state."""

import re
from pathlib import Path

import cairn
from cairn import plotting


def test_only_one_module_knows_matplotlib():
    home = Path(cairn.__file__).parent
    others = [file for file in home.rglob("*.py") if file.name != "plotting.py" and re.search(r"^\s*(import|from) matplotlib", file.read_text(), re.M)]
    assert not others


def test_a_picture_is_a_png_whatever_it_is_called_and_its_folder_is_made(tmp_path):
    figure, (left, right) = plotting.subplots(1, 2, figsize=(4, 2), sharey=True)
    left.plot([1, 2], [3, 4])
    right.plot([1, 2], [3, 4])
    path = plotting.save(figure, tmp_path / "new" / "picture.txt")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_panels_are_five_to_a_row_and_those_that_are_not_needed_are_hidden():
    figure, axes = plotting.panels(7)
    assert len(axes) == 7 and len(figure.axes) == 10 and sum(axis.get_visible() for axis in figure.axes) == 7
    assert len(plotting.panels(0)[1]) == 1


def test_no_figure_stays_open():
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    plotting.panels(3)
    assert pyplot.get_fignums() == before
