"""The documentation of this Python installation."""

from __future__ import annotations

import ast
import importlib
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from cairn.catalog import register
from cairn.data import installation
from cairn.data.corpora import Corpus, Document, digest_of, distinct, up_to
from cairn.options import Bytes


@register("corpus", "python-docs")
class PythonDocs(Corpus):
    """Prose about Python: the help topics, package descriptions, and the docstrings of every module of this machine."""

    max_bytes: Bytes | None = 64 * 2**20
    part: installation.Part = "installation"
    """`standard-library` leaves installed packages out: the texts are those of this version of Python, whatever else is installed."""

    def documents(self) -> Iterator[Document]:
        yield from up_to(distinct(self._all()), self.max_bytes)

    def fingerprint(self) -> str:
        return digest_of("python-docs", self.model_dump(), installation.fingerprint(self.part))

    def describe(self) -> dict[str, str]:
        return installation.described(self.part)

    def _all(self) -> Iterator[Document]:
        for name, text in sorted(importlib.import_module("pydoc_data.topics").topics.items()):
            yield Document(text, f"topic:{name}")
        packages = metadata.distributions() if self.part == "installation" else []
        for package in sorted(packages, key=lambda item: (item.name or "").lower()):
            description = package.metadata.get_payload() if package.metadata is not None else None  # type: ignore[attr-defined]
            if isinstance(description, str) and description.strip():
                yield Document(description, f"package:{package.name}")
        for name, path in installation.python_files(self.part):
            text = _docstrings(name, path)
            if text:
                yield Document(text, f"docstrings:{name}")


def _docstrings(name: str, path: Path) -> str | None:
    """All docstrings of a module under their dotted names; the module is parsed, never imported."""
    source = installation.read(path)
    if source is None or '"""' not in source:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return "\n\n\n".join(f"{where}\n\n{text}" for where, text in _walk(tree, module)) or None


def _walk(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, where: str) -> Iterator[tuple[str, str]]:
    text = ast.get_docstring(node)
    if text:
        yield where, text
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _walk(child, f"{where}.{child.name}")
