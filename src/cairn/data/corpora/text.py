"""Plain text files."""

from __future__ import annotations

from collections.abc import Iterator

from cairn.catalog import register
from cairn.data.corpora import Document, FileCorpus
from cairn.errors import DamagedError


@register("corpus", "text")
class Text(FileCorpus):
    """UTF-8 text files: one document each, or split at a separator."""

    separator: str | None = None
    """Text between documents inside a file, for example a blank line; None makes a file one document."""

    def documents(self) -> Iterator[Document]:
        for path in self.files():
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise DamagedError(f"{path} is not UTF-8 text (byte {error.start}); convert it first.") from None
            parts = text.split(self.separator) if self.separator else [text]
            for number, part in enumerate(parts):
                if part.strip():
                    yield Document(part, f"{path}:{number}" if self.separator else str(path))
