"""The source of this Python installation."""

from __future__ import annotations

from collections.abc import Iterator

from cairn.catalog import register
from cairn.data import installation
from cairn.data.corpora import Corpus, Document, digest_of, distinct, up_to
from cairn.options import Bytes


@register("corpus", "python-source")
class PythonSource(Corpus):
    """Python code: the standard library and the installed packages of this machine, one document a file."""

    max_bytes: Bytes | None = 64 * 2**20
    part: installation.Part = "installation"
    """`standard-library` leaves installed packages out: the texts are those of this version of Python, whatever else is installed."""

    def documents(self) -> Iterator[Document]:
        texts = ((name, installation.read(path)) for name, path in installation.python_files(self.part))
        yield from up_to(distinct(Document(text, name) for name, text in texts if text), self.max_bytes)

    def fingerprint(self) -> str:
        return digest_of("python-source", self.model_dump(), installation.fingerprint(self.part))

    def describe(self) -> dict[str, str]:
        return installation.described(self.part)
