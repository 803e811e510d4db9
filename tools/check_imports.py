"""Who may import whom: a room imports only from its own floor and from the floors below, and no modules import each other in a circle.

A lower floor meets a higher one by name through the catalog, never by import; imports for type checkers count too, and
so do modules that are named to `importlib.import_module`. Run by `make check`; exit status 1 and one line per breach.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "cairn"
FLOORS: dict[str, tuple[int, str]] = {
    "errors": (0, ""),
    "options": (0, ""),
    "describing": (0, ""),
    "catalog": (0, ""),
    "cache": (0, ""),
    "native": (0, ""),
    "randomness": (0, ""),
    "device": (0, ""),
    "statistics": (0, ""),
    "plotting": (0, ""),
    "checkpoint": (1, ""),
    "models": (2, ""),
    "data": (2, ""),
    "training": (3, ""),
    "generation": (3, ""),
    "evaluation": (4, "a"),
    "merging": (4, "b"),
    "growth": (4, "b"),
    "editing": (4, "b"),
    "compression": (4, "b"),
    "adaptation": (4, "b"),
    "selection": (4, "b"),
    "forecasting": (4, "b"),
    "fields": (4, "b"),
    "continual": (4, "c"),
    "registry": (5, ""),
    "studies": (6, ""),
    "testing": (6, ""),
    "cli": (7, ""),
    "__init__": (8, ""),
    "__main__": (8, ""),
}
"""Floor of each room, the ground floor first; a letter divides a floor. A new room gets a line here."""

WINGS = {
    "checkpoint": ("format", "saving", "memory", "operating", "foreign"),
}
"""Wings of a room, the lowest first: a wing imports only from itself and from wings before it."""

BY_NAME = {
    ("checkpoint/format/read.py", "cairn.data.text.tokenizer"),
    ("checkpoint/format/adapter.py", "cairn.models.adapters.container"),
    ("checkpoint/operating/calibrated.py", "cairn.data.text.calibration"),
    ("checkpoint/operating/calibrated.py", "cairn.models.blockwise"),
}
"""Modules that a lower floor loads by name, each for a reason that stands beside the call."""


@dataclass(frozen=True)
class Breach:
    """One import that climbs the stairs."""

    file: str
    line: int
    sentence: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.sentence}"


def check(root: Path, *, circles: bool = True) -> list[Breach]:
    """Every breach in the package whose directory is `root`."""
    files = sorted(root.rglob("*.py"))
    return [breach for path in files for breach in _check_file(path, root)] + (list(_circles(files, root)) if circles else [])


def _check_file(path: Path, root: Path) -> Iterator[Breach]:
    inside = path.relative_to(root)
    room, shown = inside.parts[0].removesuffix(".py"), inside.as_posix()
    if room not in FLOORS:
        yield Breach(shown, 1, f"the room '{room}' has no floor; give it one in tools/check_imports.py.")
        return
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    for line, module in _imported(tree, inside):
        other = module.split(".")[1]
        if other not in FLOORS:
            # `from cairn import open` takes an attribute of the package itself, which only the top floor may do.
            other = "__init__"
        if (shown, module) in BY_NAME:
            continue
        if FLOORS[other] > FLOORS[room]:
            yield Breach(shown, line, f"{room} (floor {_shown(room)}) imports {module} (floor {_shown(other)}); go through the catalog, or move it down.")
        elif other == room and _wing(room, inside.parts[1:]) < _wing(room, tuple(module.split(".")[2:])):
            yield Breach(shown, line, f"a lower wing of {room} imports {module}; move what it needs down.")


def _shown(room: str) -> str:
    number, letter = FLOORS[room]
    return f"{number}{letter}"


def _wing(room: str, inside: tuple[str, ...]) -> int:
    """Which wing of a room a module lies in, the lowest 0; rooms without wings have one."""
    wings = WINGS.get(room, ())
    return wings.index(inside[0]) if inside and inside[0] in wings else 0


def _circles(files: list[Path], root: Path) -> Iterator[Breach]:
    """Modules that import each other, directly or through others: at the top, inside functions, or for type checkers."""
    modules = {_name(path, root): path for path in files}
    edges = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = (known for _, module in _imported(tree, path.relative_to(root)) if (known := _known(module, modules)))
        edges[name] = sorted({other for other in named if other != name})
    if f"{PACKAGE}.__init__" in edges:  # the face of the package names its functions for type checkers; nobody imports it
        edges[f"{PACKAGE}.__init__"] = []
    for circle in _strong_components(edges):
        if len(circle) > 1:
            first = min(circle)
            yield Breach(modules[first].relative_to(root).as_posix(), 1, f"a circle of imports: {', '.join(sorted(circle))}.")


def _name(path: Path, root: Path) -> str:
    return ".".join([PACKAGE, *path.relative_to(root).with_suffix("").parts])


def _known(module: str, modules: dict[str, Path]) -> str | None:
    """The file behind a dotted name, which may end in an attribute."""
    for name in (module, module.rpartition(".")[0]):
        for known in (name, f"{name}.__init__"):
            if known in modules and known != f"{PACKAGE}.__init__":
                return known
    return None


def _strong_components(edges: dict[str, list[str]]) -> list[list[str]]:
    """Tarjan's algorithm: the largest sets of nodes that all reach each other."""
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        numbers[node] = lowest[node] = len(numbers)
        stack.append(node)
        for other in edges[node]:
            if other not in numbers:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], numbers[other])
        if lowest[node] == numbers[node]:
            cut = stack.index(node)
            found.append(stack[cut:])
            del stack[cut:]

    for node in edges:
        if node not in numbers:
            visit(node)
    return found


def _imported(tree: ast.AST, inside: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every module of the package that a file names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{_source(node, inside)}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and _called(node.func) == "import_module" and node.args and isinstance(node.args[0], ast.Constant):
            names = [str(node.args[0].value)]
        else:
            continue
        for name in names:
            if name.startswith(f"{PACKAGE}.") and name != f"{PACKAGE}.__version__":
                yield node.lineno, name


def _source(node: ast.ImportFrom, inside: Path) -> str:
    """The absolute name of the module after `from`."""
    if not node.level:
        return node.module or ""
    package = [PACKAGE, *inside.parts[:-1]]
    return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])


def _called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""


def main() -> int:
    """Check the package of this repository."""
    breaches = check(Path(__file__).parent.parent / "src" / PACKAGE)
    for breach in breaches:
        print(breach)
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
