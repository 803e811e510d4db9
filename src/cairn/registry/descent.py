"""The graph of descent: who comes from whom, drawn as text or laid out for a page. Nodes are digests, edges lead from child to parent."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Edges = Iterable[tuple[str, str]]


def in_circles(edges: Edges) -> list[str]:
    """The nodes from which a walk over parents leads back to them; empty for a graph that is sound."""
    parents = neighbours(edges)
    children = neighbours((b, a) for a, b in parents_of(parents))
    # A checkpoint without parents or without children is in no circle: remove such checkpoints until none is left.
    alive = set(parents) | set(children)
    for below, above in ((parents, children), (children, parents)):
        waiting = deque(node for node in alive if not below[node] & alive)
        while waiting:
            node = waiting.popleft()
            if node in alive:
                alive.discard(node)
                waiting += [other for other in above[node] if other in alive and not below[other] & alive]
    return sorted(node for node in alive if node in reachable(parents, node, first=False))


def parents_of(parents: Mapping[str, set[str]]) -> Iterable[tuple[str, str]]:
    """The edges of a graph given as neighbours."""
    return ((child, parent) for child, above in list(parents.items()) for parent in above)


def neighbours(edges: Edges) -> dict[str, set[str]]:
    """For each node, those its edges lead to."""
    found: dict[str, set[str]] = defaultdict(set)
    for begin, end in edges:
        found[begin].add(end)
    return found


def reachable(graph: Mapping[str, set[str]], start: str, *, first: bool = True, limit: int | None = None) -> dict[str, int]:
    """Nodes that a walk from `start` comes to, and after how many steps; `first` counts `start` itself, `limit` ends the walk."""
    found = {start: 0}
    waiting, circled = deque([start]), False
    while waiting:
        node = waiting.popleft()
        if limit is not None and found[node] >= limit:
            continue
        for other in sorted(graph.get(node, ())):
            circled |= other == start
            if other not in found:
                found[other] = found[node] + 1
                waiting.append(other)
    if not first and not circled:
        del found[start]
    return found


def ordered(nodes: Iterable[str], edges: Edges, key: Mapping[str, Any] | None = None) -> list[str]:
    """Children before their parents; among those that are free to come next, the largest `key` first."""
    wanted = list(dict.fromkeys(nodes))
    inside = set(wanted)
    parents = neighbours((a, b) for a, b in edges if a in inside and b in inside)
    left = {node: 0 for node in wanted}
    for _, parent in parents_of(parents):
        left[parent] += 1
    free = [node for node in wanted if not left[node]]
    found: list[str] = []
    while free:
        free.sort(key=lambda node: ((key or {}).get(node) or "", -wanted.index(node)))
        node = free.pop()
        found.append(node)
        for parent in sorted(parents[node]):
            left[parent] -= 1
            if not left[parent]:
                free.append(parent)
    return found + [node for node in wanted if node not in set(found)]


def draw(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a drawing of what `cairn log` found: a star for each checkpoint, a bar for each line of descent that goes on."""
    by_digest = {entry["digest"]: entry for entry in entries}
    edges = [(entry["digest"], parent) for entry in entries for parent in entry["parents"] if parent in by_digest]
    lanes: list[str] = []
    lines: list[str] = []
    for digest in ordered(by_digest, edges, {d: e["created"] for d, e in by_digest.items()}):
        entry = by_digest[digest]
        if digest not in lanes:
            lanes.append(digest)
        here = lanes.index(digest)
        lines.append(f"{_lanes(lanes, here, '*')} {_sentence(entry)}")
        parents = [parent for parent in entry["parents"] if parent in by_digest]
        new = [parent for parent in parents if parent not in lanes]
        lanes[here : here + 1] = new[:1]
        lanes += new[1:]
        lines += [f"{_lanes(lanes or [digest], None, '')}     {line}" for line in _remarks(entry, by_digest)]
        if len(parents) > 1:
            lines.append(f"{_lanes(lanes, None, '')}     made from {', '.join(parent[:12] for parent in parents)}")
        elif parents and not new:
            lines.append(f"{_lanes(lanes, None, '')}     from {parents[0][:12]}, below")
    return lines


def _lanes(lanes: Sequence[str], here: int | None, mark: str) -> str:
    return " ".join(mark if place == here else "|" for place in range(len(lanes)))


def _sentence(entry: Mapping[str, Any]) -> str:
    where = _short(entry["path"]) if entry["here"] else f"{entry['path'] or '?'} (not here)"
    step = f"step {entry['step']}" if entry["step"] is not None else ""
    act = f"{entry['act'] or 'unknown'}{' (' + entry['stage'] + ')' if entry.get('stage') else ''}"
    return f"{entry['digest'][:12]}  {act}  {step}  {where}  {entry['created'] or ''}".rstrip()


def _short(path: str) -> str:
    """A path as one would type it here: without detours, and from the working directory where it lies below."""
    if "://" in path:
        return path
    plain = os.path.abspath(path)
    return os.path.relpath(plain) if plain.startswith(os.getcwd() + os.sep) else plain


def _remarks(entry: Mapping[str, Any], by_digest: Mapping[str, Mapping[str, Any]]) -> list[str]:
    remarks = [f"changed {line}" for line in entry["changed"]] + [f"mixture {line}" for line in entry.get("mixture", ())]
    if len(entry["parents"]) == 1 and entry["parents"][0] in by_digest:
        remarks += [f"on other hardware: {line}" for line in other_hardware(by_digest[entry["parents"][0]]["hardware"], entry["hardware"])]
    return remarks


def other_hardware(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What of the machine changed, one line each; nothing where one side is not known."""
    if not before or not after:
        return []
    return [f"{key} {before.get(key, 'none')} -> {after.get(key, 'none')}" for key in sorted({*before, *after}) if before.get(key) != after.get(key)]


def stretches(edges: Sequence[tuple[str, str]], run: Mapping[str, str | None], *, keep: str) -> list[list[str]]:
    """Nodes of one run in a row, oldest first, each with one parent and one child of the same run: nothing begins or ends between them.

    `run` names the run of each node that lies in one. A node next to `keep` stays by itself, and so does a stretch of one.
    """
    parents, children = neighbours(edges), neighbours((parent, child) for child, parent in edges)

    def inner(node: str) -> bool:
        around = (*parents.get(node, ()), *children.get(node, ()))
        alone = len(parents.get(node, ())) == 1 and len(children.get(node, ())) == 1
        return alone and keep not in around and run.get(node) is not None and all(run.get(other) == run[node] for other in around)

    found = []
    for node in [node for node in run if inner(node)]:
        if inner(next(iter(parents[node]))):
            continue
        row = [node]
        while inner(following := next(iter(children[row[-1]]))):
            row.append(following)
        if len(row) > 1:
            found.append(row)
    return found


@dataclass(frozen=True)
class Spot:
    """Where a node stands in a picture: `column` counts generations from the oldest, `row` keeps lines of descent apart."""

    digest: str
    column: int
    row: int


def layout(nodes: Iterable[str], edges: Sequence[tuple[str, str]]) -> list[Spot]:
    """A place for every node: parents stand left of their children, a line of descent stays in its row while it can."""
    order = ordered(nodes, edges)[::-1]
    inside = set(order)
    parents: dict[str, list[str]] = defaultdict(list)
    for child, parent in edges:
        if child in inside and parent in inside:
            parents[child].append(parent)
    column: dict[str, int] = {}
    row: dict[str, int] = {}
    taken: set[tuple[int, int]] = set()
    continued: set[str] = set()
    for node in order:
        above = sorted(parents[node], key=lambda parent: (-column.get(parent, 0), row.get(parent, 0)))
        column[node] = 1 + max((column.get(parent, -1) for parent in above), default=-1)
        heir = next((parent for parent in above if parent in row and parent not in continued), None)
        wish = row[heir] if heir is not None else 0
        if heir is not None:
            continued.add(heir)
        while (column[node], wish) in taken:
            wish += 1
        row[node] = wish
        taken.add((column[node], wish))
    return [Spot(node, column[node], row[node]) for node in order]
