"""Plain text files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pydantic import Field

from cairn.catalog import register
from cairn.data import files
from cairn.data.corpora import Document, FileCorpus
from cairn.data.corpora.passages import LONGEST, end_of_passage, passages


@register("corpus", "text")
class Text(FileCorpus):
    """UTF-8 text files, compressed or not: one document each, or split at a separator; what is longer than `longest` is cut into passages."""

    separator: str | None = None
    """Text between documents inside a file, for example a blank line; None makes a file one document."""
    longest: int = Field(LONGEST, ge=1)
    """Characters from which on a document is cut: behind the last blank line before, else the last line, else the last word."""

    def documents(self) -> Iterator[Document]:
        for path in self.files():
            for number, part in enumerate(self._split(files.parts(path))):
                if part.strip():
                    yield Document(part, f"{path}:{number}")

    def _split(self, parts: Iterable[str]) -> Iterator[str]:
        """The documents of one file, of which only as much is held as one document may be long."""
        if self.separator is None:
            yield from passages(parts, self.longest)
            return
        mark = self.separator.replace("\r\n", "\n").replace("\r", "\n")
        held = ""
        for part in parts:
            held += part
            while True:
                place = held.find(mark)
                if place >= 0:
                    yield from passages([held[:place]], self.longest)
                    held = held[place + len(mark) :]
                elif len(held) > self.longest + len(mark):  # the mark cannot begin before what is cut off
                    end = end_of_passage(held, self.longest)
                    yield held[:end]
                    held = held[end:]
                else:
                    break
        yield from passages([held], self.longest)
