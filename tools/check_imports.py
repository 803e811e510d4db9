"""Who may import whom: a room imports only from its own floor and from the floors below.

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
FLOORS = {
    "errors": 0,
    "options": 0,
    "catalog": 0,
    "cache": 0,
    "native": 0,
    "checkpoint": 1,
    "models": 2,
    "data": 2,
    "train": 3,
    "generate": 3,
    "evaluate": 4,
    "merge": 4,
    "grow": 4,
    "edit": 4,
    "compress": 4,
    "adapt": 4,
    "continual": 4,
    "select": 4,
    "forecast": 4,
    "fields": 4,
    "registry": 5,
    "studies": 6,
    "demo": 6,
    "cli": 7,
    "__init__": 8,
    "__main__": 8,
}
"""Floor of each room, the ground floor first. A new room gets a line here."""

BY_NAME = {("checkpoint/read.py", "cairn.data.text.tokenizer")}
"""Modules that a lower floor loads by name, each for a reason that stands beside the call."""


@dataclass(frozen=True)
class Breach:
    """One import that climbs the stairs."""

    file: str
    line: int
    sentence: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.sentence}"


def check(root: Path) -> list[Breach]:
    """Every breach in the package whose directory is `root`."""
    return [breach for path in sorted(root.rglob("*.py")) for breach in _check_file(path, root)]


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
        if FLOORS[other] > FLOORS[room] and (shown, module) not in BY_NAME:
            yield Breach(shown, line, f"{room} (floor {FLOORS[room]}) imports {module} (floor {FLOORS[other]}); go through the catalog, or move it down.")


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
