"""Where long texts are cut: behind the last blank line before the limit, else behind the last line, else behind the last word, else at the limit.

A break counts when it lies in the second half of what the limit allows, so that no passage is much shorter than it must be. Nothing is lost: the
passages of a text, joined, are the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cairn.data.corpora import Document

LONGEST = 2**14
"""Characters of the longest document of a text file by default: a book becomes hundreds of documents, some of which are held out."""
AT_ONCE = 2**20
"""Characters of the longest document of any corpus that is encoded at once; what is longer is cut into documents of this size."""


def end_of_passage(text: str, longest: int) -> int:
    """Where the first passage of a text ends that is longer than `longest`."""
    for mark in ("\n\n", "\n", " "):
        place = text.rfind(mark, longest // 2, longest)
        if place >= 0:
            return place + len(mark)
    return longest


def passages(parts: Iterable[str], longest: int) -> Iterator[str]:
    """The passages of a text that comes in parts; only one of them and one part are held."""
    held = ""
    for part in parts:
        held += part
        begin = 0
        while len(held) - begin > longest:
            end = begin + end_of_passage(held[begin : begin + longest + 1], longest)
            yield held[begin:end]
            begin = end
        held = held[begin:]
    if held:
        yield held


def cut(documents: Iterable[Document], longest: int = AT_ONCE) -> Iterator[Document]:
    """The documents, those that are longer cut into several."""
    for document in documents:
        if len(document.text) <= longest:
            yield document
            continue
        for number, text in enumerate(passages([document.text], longest)):
            yield document._replace(text=text, id=f"{document.id}#{number}")
