"""Named data sets as running text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cairn.catalog import register
from cairn.data import datasets
from cairn.data.corpora import Corpus, Document, digest_of
from cairn.errors import InputError

_PASSAGE = 1000
"""Characters from which on a blank line ends a document, in sets that are one long text."""


@register("corpus", "dataset")
class Dataset(Corpus):
    """The text of a named data set (`cairn data list`): one document a row, or a passage of a long text."""

    dataset: str
    file: str | None = None
    """One file of the set; default: all of them."""

    def documents(self) -> Iterator[Document]:
        number = 0
        for row in datasets.rows(self.dataset, self.file):
            for text in _texts(row, self.dataset):
                yield Document(text, f"{self.dataset}:{number}", row)
                number += 1

    def fingerprint(self) -> str:
        return digest_of("dataset", self.model_dump(), datasets.contents(self.dataset))

    def note(self) -> None:
        datasets.note(self.dataset)

    def describe(self) -> dict[str, str]:
        entry = datasets.get(self.dataset)
        return {"origin": f"{entry.repository}@{entry.commit}", "license": entry.license}


def _texts(row: dict[str, Any], name: str) -> Iterator[str]:
    """The texts in a row, by the field names in use: question and answer belong together, a good sentence stands for its pair."""
    if "question" in row and "answer" in row:
        yield f"{row['question']}\n{row['answer']}"
    elif "instruction" in row and "output" in row:
        yield "\n".join(part for part in (row["instruction"], row.get("input"), row["output"]) if part)
    elif isinstance(row.get("sentence_good"), str):
        yield row["sentence_good"]
    elif isinstance(row.get("text"), str):
        yield from _passages(row["text"])
    else:
        raise InputError(f"The data set '{name}' is a table, not text (its fields are {', '.join(row)}).")


def _passages(text: str) -> Iterator[str]:
    if len(text) <= 4 * _PASSAGE:
        yield text
        return
    passage = ""
    for part in text.split("\n\n"):
        passage = f"{passage}\n\n{part}" if passage else part
        if len(passage) >= _PASSAGE:
            yield passage
            passage = ""
    if passage.strip():
        yield passage
