"""JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from cairn.catalog import register
from cairn.data.corpora import Document, FileCorpus
from cairn.errors import DamagedError


@register("corpus", "jsonl")
class JsonLines(FileCorpus):
    """Files with one JSON object a line; one field of it is the text."""

    field: str = "text"

    def documents(self) -> Iterator[Document]:
        for path in self.files():
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        row = self._row(line, f"{path}, line {number}")
                        yield Document(row[self.field], f"{path}:{number}", row)

    def _row(self, line: str, where: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError:
            raise DamagedError(f"{where} is not valid JSON.") from None
        if not isinstance(row, dict) or not isinstance(row.get(self.field), str):
            fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise DamagedError(f"{where} has no text in '{self.field}' (it has {fields}); set field=NAME.")
        return row
