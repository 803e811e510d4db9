"""Which texts are read: noted while somebody wants to know, so that a figure can say what it was made from.

with reading.noted() as read:
    ...                                   # whatever resolves corpora and opens named data sets
reading.digests(read)                     # name -> origin, and the digest of the contents as they are now
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple


class Source(NamedTuple):
    """Something that was read: where it comes from, and how to get the digest of its contents."""

    origin: str
    digest: Callable[[], str]


_read: ContextVar[dict[str, Source] | None] = ContextVar("read", default=None)


@contextlib.contextmanager
def noted() -> Iterator[dict[str, Source]]:
    """Everything that is read inside, by name; a block inside another one notes for both."""
    outer, inner = _read.get(), dict[str, Source]()
    token = _read.set(inner)
    try:
        yield inner
    finally:
        _read.reset(token)
        if outer is not None:
            outer |= inner


def note(name: str, origin: str, digest: Callable[[], str]) -> None:
    """Say that something is read; costs nothing where nobody asks."""
    found = _read.get()
    if found is not None:
        found.setdefault(name, Source(origin, digest))


def digests(read: Mapping[str, Source]) -> dict[str, dict[str, Any]]:
    """Origin and digest of each source, by name."""
    return {name: {"origin": source.origin, "digest": source.digest()} for name, source in sorted(read.items())}
