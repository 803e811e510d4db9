"""Write src/cairn/catalog.json: names, summaries and papers of the package's own methods, so that `cairn catalog` imports none of them."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cairn import catalog

FILE = Path(catalog.__file__).with_name(catalog.INDEX)


def document() -> dict[str, Any]:
    """The index as it should be: every module of every room is imported."""
    found = {}
    for kind in catalog.KINDS:
        modules = catalog.modules(kind)
        for module in modules:
            if catalog.registers(module, kind):
                importlib.import_module(module)
        lines = [
            {"name": entry.name, "module": entry.module, "summary": entry.summary, "papers": [asdict(paper) for paper in entry.papers]}
            for entry in catalog.registered(kind)
            if entry.module in modules
        ]
        found[kind] = {"modules": modules, "entries": lines}
    return found


def text() -> str:
    """The file's contents."""
    return json.dumps(document(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
