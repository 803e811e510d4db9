"""JSON lines."""

from __future__ import annotations

from collections.abc import Iterator

from cairn.catalog import register
from cairn.data import files
from cairn.data.corpora import Document, FileCorpus
from cairn.errors import DamagedError


@register("corpus", "jsonl")
class JsonLines(FileCorpus):
    """Files with one JSON object a line, compressed or not; one field of it is the text."""

    field: str = "text"

    def documents(self) -> Iterator[Document]:
        for path in self.files():
            for where, row in files.rows(path):
                text = row.get(self.field)
                if not isinstance(text, str):
                    raise DamagedError(f"{where} has no text in '{self.field}' (it has {', '.join(row)}); set field=NAME.")
                yield Document(text, where, row)
