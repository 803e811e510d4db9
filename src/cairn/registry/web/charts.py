"""Curves and lineage as SVG, drawn by the server. Colours come from the page's style sheet, so that they suit light and dark."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from cairn.registry.descent import Spot

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 28
MOST_POINTS = 300
DRAWN = 1e30
"""Numbers from here on are no measurements, and their differences would not be finite."""

CELL_WIDTH, CELL_HEIGHT, BOX_WIDTH, BOX_HEIGHT = 216, 76, 172, 52


@dataclass(frozen=True)
class Series:
    """One curve: points by x, and a band around each if there is one."""

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]] = ()
    marks: bool = False


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most so many points: means of equal stretches; the last point stays as it is."""
    finite = [(x, y) for x, y in points if abs(x) < DRAWN and abs(y) < DRAWN]
    if len(finite) <= most:
        return finite
    size = -(-len(finite) // (most - 1))
    groups = [finite[begin : begin + size] for begin in range(0, len(finite), size)]
    return [*((sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups), finite[-1]]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers between two values, about so many."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [step * number for number in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A number in few letters: 1.2M, 3.45, 2e-05."""
    size = abs(value)
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (limit if unit != 'k' else 1e3):.3g}{unit}"
    return f"{value:.4g}"


def lines(title: str, series: Sequence[Series], x_label: str = "tokens") -> str:
    """Curves in one frame, or a sentence where there is nothing to draw."""
    shown = [(s, thinned(s.points)) for s in series]
    shown = [(s, points) for s, points in shown if points]
    if not shown:
        return f'<p class="quiet">{escape(title)}: nothing yet.</p>'
    xs = [x for _, points in shown for x, _ in points]
    ys = [y for s, points in shown for y in [*(y for _, y in points), *(edge for pair in s.band for edge in pair if abs(edge) < DRAWN)]]
    (x0, x1), (y0, y1) = _range(xs), _range(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return round(LEFT + across * (WIDTH - LEFT - RIGHT), 1), round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" data-x="{escape(x_label)}">']
    for value in ticks(y0, y1):
        y = place(x0, value)[1]
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/><text class="tick" x="{LEFT - 6}" y="{y + 4}">{number(value)}</text>'
        )
    for value in ticks(x0, x1, 5):
        x = place(value, y0)[0]
        parts.append(f'<text class="tick middle" x="{x}" y="{HEIGHT - 8}">{number(value)}</text>')
    for place_in_list, (s, points) in enumerate(shown):
        parts.append(_curve(s, points, place_in_list % 6, place))
    legend = "".join(f'<li class="c{i % 6}">{escape(s.name)} <b>{number(points[-1][1])}</b></li>' for i, (s, points) in enumerate(shown))
    caption = f'<span>{escape(title)} <small>over {escape(x_label)}</small></span><ul class="legend">{legend}</ul>'
    return f"<figure><figcaption>{caption}</figcaption>{''.join(parts)}</svg></figure>"


def _curve(s: Series, points: Sequence[tuple[float, float]], colour: int, place: object) -> str:
    at = place
    assert callable(at)
    where = [at(x, y) for x, y in points]
    parts = []
    if s.band and len(s.band) == len(points):
        edges = [at(x, high) for (x, _), (_, high) in zip(points, s.band, strict=True)]
        edges += [at(x, low) for (x, _), (low, _) in reversed(list(zip(points, s.band, strict=True)))]
        parts.append(f'<polygon class="band c{colour}" points="{_list(edges)}"/>')
    data = escape(json.dumps([[*spot, x, y] for spot, (x, y) in zip(where, points, strict=True)]), quote=True)
    parts.append(f'<polyline class="line c{colour}" points="{_list(where)}" data-name="{escape(s.name)}" data-points="{data}"/>')
    if s.marks or len(where) == 1:
        parts += [f'<circle class="mark c{colour}" cx="{x}" cy="{y}" r="3"/>' for x, y in where]
    return "".join(parts)


def _list(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.04 or abs(high) * 0.05 or 1.0
    return low - room, high + room


def sparkline(values: Sequence[float]) -> str:
    """A curve as small as a word."""
    points = thinned([(float(i), v) for i, v in enumerate(values)], 60)
    if len(points) < 2:
        return ""
    (x0, x1), (y0, y1) = (points[0][0], points[-1][0]), _range([y for _, y in points])
    places = [(round(100 * (x - x0) / (x1 - x0), 1), round(24 - 24 * (y - y0) / (y1 - y0), 1)) for x, y in points]
    return f'<svg class="spark" viewBox="0 0 100 24" preserveAspectRatio="none" aria-hidden="true"><polyline points="{_list(places)}"/></svg>'


@dataclass(frozen=True)
class Node:
    """What a box of the lineage says, and where it leads."""

    title: str
    note: str
    kind: str
    """`run`, `fork`, `operation`, `import` or `absent`: the colour."""
    address: str | None = None
    here: bool = False


def graph(spots: Sequence[Spot], edges: Sequence[tuple[str, str]], nodes: Mapping[str, Node]) -> str:
    """The lineage: parents left of their children, every box that is here a link."""
    places = {spot.digest: (spot.column * CELL_WIDTH + 8, spot.row * CELL_HEIGHT + 8) for spot in spots}
    width = max((x for x, _ in places.values()), default=0) + BOX_WIDTH + 16
    height = max((y for _, y in places.values()), default=0) + BOX_HEIGHT + 16
    parts = [f'<svg class="lineage" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="group" aria-label="lineage">']
    for child, parent in edges:
        if child in places and parent in places:
            (x1, y1), (x2, y2) = places[parent], places[child]
            begin, end = (x1 + BOX_WIDTH, y1 + BOX_HEIGHT / 2), (x2, y2 + BOX_HEIGHT / 2)
            bend = (end[0] - begin[0]) / 2
            parts.append(f'<path class="edge" d="M{begin[0]},{begin[1]} C{begin[0] + bend},{begin[1]} {end[0] - bend},{end[1]} {end[0]},{end[1]}"/>')
    for digest, (x, y) in places.items():
        node = nodes[digest]
        box = f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="8"/>'
        text = f'<text x="{x + 10}" y="{y + 21}">{escape(_cut(node.title))}</text>'
        text += f'<text class="note" x="{x + 10}" y="{y + 39}">{escape(_cut(node.note, 26))}</text>'
        body = f'<g class="node {escape(node.kind)}{" here" if node.here else ""}"><title>{escape(node.title)}</title>{box}{text}</g>'
        parts.append(f'<a href="{escape(node.address)}">{body}</a>' if node.address else body)
    return "".join(parts) + "</svg>"


def _cut(text: str, most: int = 22) -> str:
    return text if len(text) <= most else f"{text[: most - 9]}…{text[-8:]}"
