"""The index of the catalog, which lists methods without importing them, says what the methods say."""

import importlib.util
import json
from pathlib import Path


def test_the_index_is_what_the_tool_would_write():
    path = Path(__file__).parent.parent.parent / "tools" / "catalog_index.py"
    spec = importlib.util.spec_from_file_location("catalog_index", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    made, kept = tool.document(), json.loads(tool.FILE.read_bytes())
    assert list(made) == list(kept), "run tools/catalog_index.py"
    for kind in made:
        assert made[kind] == kept[kind], f"run tools/catalog_index.py: {kind} has changed"
