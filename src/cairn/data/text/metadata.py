"""Metadata in front of documents: where a text comes from, read by the model but never learned by heart.

    [end of text] URL: docs.python.org <blank line> text of the document ...

The tokens of the metadata have no loss. They are encoded apart from the text, so that no token spans the border. Towards
the end of a run, from `until` on, documents of their own come without metadata: the model must do without them.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from blake3 import blake3
from pydantic import Field, field_validator

from cairn.data.corpora import Document
from cairn.options import Amount, Options


def host(url: str) -> str:
    """The host of a URL in lower case, without user, port and path; what has no scheme is cut at the first slash. '' if there is none."""
    try:
        return urlsplit(url if "://" in url else f"//{url.lstrip('/')}").hostname or ""
    except ValueError:  # brackets that are no address
        return ""


def _domain(url: str) -> str:
    return ".".join(host(url).split(".")[-2:])


def _hashed(url: str) -> str:
    """A name that says nothing and is always the same for the same host."""
    name = host(url)
    return str(uuid.UUID(bytes=blake3(name.encode()).digest(16))) if name else ""


TRANSFORMS: dict[str, Callable[[str], str]] = {
    "host": host,
    "domain": _domain,
    "suffix": lambda url: host(url).rpartition(".")[2],
    "hash": _hashed,
    "text": lambda text: text,
}


class Metadata(Options):
    """What stands in front of documents, and until when ("Metadata Conditioning Accelerates Language Model Pre-training", section 2)."""

    field: str = "url"
    """The field of a document that is shown; `source` (the source's name in the recipe) and `id` are always there. A document without
    it comes as it is."""
    template: str = "URL: {}\n\n"
    """The text in front, `{}` for the value; without `{}` the same text for all."""
    transform: Literal["host", "domain", "suffix", "hash", "text"] = "host"
    """`host` of a URL, the last two labels of it, the last one, a meaningless name for each host, or the value as it is."""
    known: list[str] | None = None
    """Values that are shown; every other one becomes `unknown`."""
    probability: float = Field(1.0, gt=0, le=1)
    """Share of the documents that have their metadata shown, chosen by their text."""
    until: Amount = Amount(90, "%")
    """Where metadata end, counted from where these data begin: the rest of the run is the cooldown. 100 %: there is none."""
    reserved: float | None = Field(None, ge=0, lt=1)
    """Share of the documents that are kept for the cooldown, so that it reads nothing twice; default: the cooldown's share of the run."""

    @field_validator("template")
    @classmethod
    def _one_place(cls, value: str) -> str:
        if not value or value.count("{") != value.count("{}") or value.count("{}") > 1 or value.count("}") != value.count("{}"):
            raise ValueError(f"'{value}' is no template: write the text with {{}} where the value goes.")
        return value

    def shown(self, value: str) -> str:
        """The text in front of a document whose transformed value is `value`."""
        return self.template.replace("{}", value)

    def prefix(self, document: Document, about: Mapping[str, str]) -> str | None:
        """The text in front of a document, or None; `about` are fields that all documents of a source share."""
        if self.probability < 1 and share_of(document.text, "metadata") >= self.probability:
            return None
        value = {**document.fields, "id": document.id, **about}.get(self.field)
        if not isinstance(value, str) or not (found := TRANSFORMS[self.transform](value)):
            return None
        return self.shown(found if self.known is None or found in self.known else "unknown")

    def pinned(self, batch: int, total: int) -> Self:
        """A copy with `until` in tokens, at a whole step, and `reserved` as a number."""
        until = self.until.steps(batch, total) * batch
        reserved = self.reserved if self.reserved is not None else max(0.0, 1 - until / total)
        return self.model_copy(update={"until": Amount(until, ""), "reserved": reserved})

    def identity(self) -> dict[str, Any]:
        """What decides the tokens of a prepared store."""
        return self.model_dump(mode="json", exclude={"until", "reserved"})


def share_of(text: str, purpose: str) -> float:
    """A number in [0, 1) that a document's text and a purpose decide."""
    digest = blake3(purpose.encode() + b"\0" + text.encode(errors="surrogatepass")).digest(8)
    return int.from_bytes(digest, "little") / 2.0**64
