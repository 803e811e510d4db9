"""Pictures: matplotlib set up in one place, without a screen and without state that is shared between figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACROSS = 5
"""Panels side by side."""
DPI = 130


def subplots(rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes, as `pyplot.subplots` gives them; nothing has to be closed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def panels(count: int) -> tuple[Figure, list[Any]]:
    """A figure with so many axes side by side, five to a row."""
    shown = max(count, 1)
    across = min(shown, ACROSS)
    down = -(-shown // across)
    figure, axes = subplots(down, across, figsize=(5 * across, 3.6 * down), squeeze=False)
    for number, axis in enumerate(axes.flat):
        axis.grid(alpha=0.3)
        axis.set_visible(number < shown)
    return figure, list(axes.flat)[:shown]


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as a PNG; its folder is made where it is not there. Returns the path."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=DPI, format="png")
    return file
