"""JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator

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
                        yield Document(self._text(line, f"{path}, line {number}"), f"{path}:{number}")

    def _text(self, line: str, where: str) -> str:
        try:
            row = json.loads(line)
        except ValueError:
            raise DamagedError(f"{where} is not valid JSON.") from None
        text = row.get(self.field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise DamagedError(f"{where} has no text in '{self.field}' (it has {fields}); set field=NAME.")
        return text
