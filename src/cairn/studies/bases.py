"""Runs that several studies, seeds or arms begin from: trained once, found again by what they are made of.

A run is a pure function of its recipe and its documents, so one that was trained before is the one that would be trained now.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from cairn import catalog
from cairn.checkpoint import lineage, read
from cairn.data import cache, corpora
from cairn.data.corpora import FileCorpus, digest_of
from cairn.train import recipe as recipes
from cairn.train.run import Run, fork, train


def trained(recipe: Mapping[str, Any], start: str | Path | None = None) -> Run:
    """The run of `recipe` from scratch, or as a stage of its own after the checkpoint `start`; from the user's cache if it is there.

    A stage has its full length, its own schedule and a fresh optimizer.
    """
    parsed, changes = recipes.load(recipe), list[str]()
    if start is not None:
        length = parsed.total_tokens
        changes = ["schedule.start=now", f"schedule.horizon={length} tokens", f"training.tokens={length + (read.open(start).tokens or 0)} tokens"]
    values = parsed.plain()
    values["data"]["sources"] = {name: [source.weight, _contents(source.corpus)] for name, source in parsed.data.sources.items()}
    key = digest_of(values, lineage.versions(), read.open(start).digest if start is not None else None)[:24]
    path = cache.directory() / "bases" / key

    def fill(folder: Path) -> None:
        if start is None:
            train(recipe, folder / "run")
        else:
            fork(start, folder / "run", changes, recipe=recipe, fresh=["optimizer"])

    if not path.exists():
        cache.publish(path, fill)
    return Run(path / "run")


def _contents(spec: Any) -> Any:
    """What identifies the documents of a corpus, wherever its files lie."""
    corpus = corpora.resolve(spec)
    if not isinstance(corpus, FileCorpus):
        return corpus.fingerprint()
    digest = blake3()
    for document in corpus.documents():
        digest.update(document.text.encode() + b"\0")
    return [catalog.name_of(corpus), digest.hexdigest()]
