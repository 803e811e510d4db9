"""Tagged sentences of one source: words, and the tag of each word that has one.

A source is a `.jsonl` file whose lines hold `words` and `tags` (lists of one length; a tag may be null), a `.conllu` treebank, or such a file of a
named data set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from cairn.data import datasets, files
from cairn.errors import DamagedError, InputError, NotFoundError, suggestion

UNTAGGED = -1
"""The number of a tag that a word does not have."""
FORM, UPOS = 1, 3
"""Columns of a treebank: the word as it stands in the text, and its part of speech."""


@dataclass(frozen=True)
class SentenceSet:
    """n sentences: their words, one after the other in `numbers` as numbers into `vocabulary`, each sentence from `starts[i]` to `starts[i + 1]`; the
    number of each word's tag among `classes`, or -1; a key of each sentence from its content."""

    vocabulary: list[str]
    numbers: NDArray[np.int64]
    starts: NDArray[np.int64]
    tags: NDArray[np.int64]
    classes: list[str]
    keys: NDArray[np.uint64]
    digest: str

    def __len__(self) -> int:
        return len(self.keys)


def open_sentences(spec: str, file: str | None = None, longest: int = 256) -> SentenceSet:
    """The sentences of a source; of each the first `longest` words.

    Raises `NotFoundError` if there is nothing of the kind, `InputError` and `DamagedError` for what is no tagged sentence.
    """
    vocabulary: dict[str, int] = {}
    classes: dict[str, int] = {}
    numbers: list[int] = []
    tags: list[int] = []
    starts, keys, digest = [0], [], blake3()
    for where, words, marks in _rows(spec, file):
        if not words:
            continue
        if len(words) != len(marks):
            raise InputError(f"{where}: {len(words)} words and {len(marks)} tags; there has to be one tag for each word (null for none).")
        content = "\0".join(words[:longest]).encode("utf-8", "surrogatepass")
        keys.append(int.from_bytes(blake3(content).digest(8), "little"))
        digest.update(content + b"\1" + "\0".join(mark or "" for mark in marks[:longest]).encode("utf-8", "surrogatepass") + b"\2")
        numbers += [vocabulary.setdefault(word, len(vocabulary)) for word in words[:longest]]
        tags += [UNTAGGED if mark is None else classes.setdefault(mark, len(classes)) for mark in marks[:longest]]
        starts.append(len(numbers))
    if not keys:
        raise InputError(f"{spec} holds no sentences.")
    places, bounds, marked = (np.array(values, np.int64) for values in (numbers, starts, tags))
    return SentenceSet(list(vocabulary), places, bounds, marked, list(classes), np.array(keys, np.uint64), digest.hexdigest())


def _rows(spec: str, file: str | None) -> Iterator[tuple[str, list[str], list[str | None]]]:
    """Each sentence: where it stands, its words, their tags."""
    if file is not None or spec in datasets.names():
        if file is None:
            known = ", ".join(sorted(member for member in datasets.get(spec).files if member.endswith(".conllu"))) or "none with tagged sentences"
            raise InputError(f"The data set '{spec}' has several files; say which: file: NAME. It has {known}.")
        for number, row in enumerate(datasets.rows(spec, file), 1):
            yield _of_treebank(row, f"{spec}/{file}, sentence {number}")
        return
    path = Path(spec)
    if not path.is_file():
        raise NotFoundError(
            f"There are no sentences at '{spec}'.{suggestion(spec, datasets.names())} Name a .jsonl or .conllu file, or a data set and its file."
        )
    if path.suffix == ".conllu":
        for number, row in enumerate(datasets.sentences(path), 1):
            yield _of_treebank(row, f"{path}, sentence {number}")
        return
    for where, row in files.rows(path):
        words, marks = row.get("words"), row.get("tags")
        if not isinstance(words, list) or not isinstance(marks, list) or not all(isinstance(word, str) for word in words):
            raise InputError(f"{where}: a line has 'words', a list of texts, and 'tags', a list of texts or null.")
        if not all(mark is None or isinstance(mark, str) for mark in marks):
            raise InputError(f"{where}: a tag is a text, or null where a word has none.")
        yield where, words, marks


def _of_treebank(row: Any, where: str) -> tuple[str, list[str], list[str | None]]:
    lines = row.get("words") if isinstance(row, dict) else None
    if not isinstance(lines, list) or not all(len(line) > UPOS for line in lines):
        raise DamagedError(f"{where}: a line of a treebank has ten columns.")
    return where, [line[FORM] for line in lines], [None if line[UPOS] == "_" else line[UPOS] for line in lines]
