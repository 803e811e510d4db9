"""What is known of one checkpoint, from its small files alone, each fact with how it is known: measured, derived or stated."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3

from cairn import catalog
from cairn.checkpoint.format.layout import read_layout
from cairn.checkpoint.format.place import sizes
from cairn.checkpoint.format.read import CHECKPOINTS, STAGES, Checkpoint
from cairn.registry import licenses, modelcard, statements
from cairn.registry.statements import Claim, Statement

How = Literal["measured", "derived", "stated"]

STATED = ("name", "version", "license", "language", "intended_use", "limitations", "citation", "paper", "fine_tuning", "price_per_hour", "watts")


@dataclass(frozen=True)
class Fact:
    """One field of a record. `measured`: read off the files; `derived`: from lineage; `stated`: somebody says so."""

    field: str
    value: Any
    how: How


@dataclass
class CheckpointRecord:
    """What the registry knows of one checkpoint."""

    path: Path
    key: str
    """Short name of the place, used in addresses; the digest names the state, which may lie in several places."""
    run: Path | None
    digest: str
    model_digest: str
    facts: dict[str, Fact] = field(default_factory=dict)
    files: dict[str, tuple[int, str | None]] = field(default_factory=dict)
    """Size and digest of each file."""
    parents: list[tuple[str, int | None, str | None]] = field(default_factory=list)
    """Digest, step and hinted path of each parent, in order."""
    claims: list[Claim] = field(default_factory=list)

    def value(self, name: str) -> Any:
        """The value of a fact, or None."""
        fact = self.facts.get(name)
        return fact.value if fact is not None else None

    @property
    def title(self) -> str:
        """How people call it: its stated name, else run and step."""
        stated = self.value("name")
        return str(stated) if stated else f"{name_of(self.run)}/{self.path.name}" if self.run is not None else name_of(self.path)


def key_of(path: Path) -> str:
    """The short name of a place."""
    return blake3(str(path).encode()).hexdigest()[:16]


def name_of(path: Path) -> str:
    """How people call a run, or a checkpoint outside of one: by its folder; a stage of a larger run also by that."""
    return f"{path.parent.parent.name}/{path.name}" if path.parent.name == STAGES else path.name


def run_of(path: Path) -> Path | None:
    """The run in whose directory a checkpoint lies."""
    return path.parent.parent if path.parent.name == CHECKPOINTS else None


def record(checkpoint: Checkpoint) -> CheckpointRecord:
    """Everything that the small files of a checkpoint say. Raises `DamagedError` where they cannot be read."""
    path = checkpoint.path.resolve()
    found = CheckpointRecord(path, key_of(path), run_of(path), checkpoint.digest, checkpoint.model_digest)
    said = statements.load(checkpoint)
    for fact in (*_measured(checkpoint), *_derived(checkpoint), *_stated(checkpoint, said)):
        found.facts[fact.field] = fact
    digests = {name: entry.digest for name, entry in checkpoint.manifest.files.items()} if checkpoint.is_ours else {}
    there = {name: size for name, size in sizes(path).items() if not name.startswith(".")}
    found.files = {name: (size, digests.get(name)) for name, size in sorted(there.items())}
    origin = checkpoint.lineage
    # An export of bare weights has the digest of what it was made from: the same state, not another one.
    found.parents = [(p.digest, p.step, p.path) for p in origin.parents if p.digest != found.digest] if origin else []
    found.claims = [*modelcard.claims_in(path / "README.md"), *said.claims]
    return found


def _measured(checkpoint: Checkpoint) -> Iterator[Fact]:
    specs = [spec for name in sizes(checkpoint.path) if name.startswith("model") and name.endswith(".safetensors") for spec in _specs(checkpoint.path / name)]
    config = checkpoint.config
    yield Fact("family", _text(config.get("model_type")), "measured")
    yield Fact("architecture", next(map(_text, config.get("architectures") or []), None), "measured")
    yield Fact("parameters", sum(math.prod(spec.shape) for spec in specs), "measured")
    yield Fact("dtypes", dict(Counter(spec.dtype for spec in specs)), "measured")
    yield Fact("weight_bytes", sum(spec.nbytes for spec in specs), "measured")
    yield Fact("bytes", sum(size for name, size in sizes(checkpoint.path).items() if not name.startswith(".")), "measured")
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings"):
        if name in checkpoint.config:
            yield Fact(name, checkpoint.config[name], "measured")
    yield Fact("tokenizer", (checkpoint.path / "tokenizer.json").is_file(), "measured")
    yield Fact("resumable", checkpoint.trainer is not None and any(name.startswith("optimizer") for name in sizes(checkpoint.path)), "measured")


def _text(value: Any) -> str | None:
    """What is a text where one belongs; whatever else stands there is left out."""
    return value if isinstance(value, str) else None


def _words(value: Any) -> list[str]:
    """What a card says in one word or in a list of words; whatever else stands there is left out."""
    return [each.strip() for each in (value if isinstance(value, list) else [value]) if isinstance(each, str) and each.strip()]


def _specs(path: Path) -> Iterator[Any]:
    yield from read_layout(path).specs


def _derived(checkpoint: Checkpoint) -> Iterator[Fact]:
    if checkpoint.trainer is not None:
        yield Fact("step", checkpoint.step, "derived")
        yield Fact(checkpoint.unit, checkpoint.units, "derived")
    origin = checkpoint.lineage
    if origin is None:
        return
    yield Fact("act", f"{origin.kind}: {origin.name}", "derived")
    yield Fact("created", origin.created, "derived")
    yield Fact("changed", origin.changed, "derived")
    yield Fact("versions", origin.versions, "derived")
    yield Fact("hardware", origin.hardware, "derived")
    recipe = origin.options.get("recipe")
    if isinstance(recipe, Mapping):
        yield Fact("recipe", recipe, "derived")
        yield Fact("data", sources_of(recipe), "derived")
        yield Fact("seed", recipe.get("seed"), "derived")
    else:
        yield Fact("options", origin.options, "derived")


def sources_of(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The sources of a recipe and where the data of each are, as its field names it: a corpus, images, sentences."""
    found, data = {}, recipe.get("data", {})
    named = str(data.get("name", "text"))
    key = catalog.get("field", named).implementation.source_key if catalog.has("field", named) else "corpus"
    for name, source in (data.get("sources") or {}).items():
        corpus = source.get(key) if isinstance(source, Mapping) else source
        if isinstance(corpus, Mapping):
            # Of a named set its name says more than that it is one; of a file, where it lies.
            corpus = corpus.get("dataset") or corpus.get("paths") or corpus.get("name")
        found[str(name)] = ", ".join(map(str, corpus)) if isinstance(corpus, list) else str(corpus)
    return found


def _stated(checkpoint: Checkpoint, said: Statement) -> Iterator[Fact]:
    front = modelcard.front_matter(checkpoint.path / "README.md")
    licenses_of_card = [licenses.canonical(word) for word in _words(front.get("license"))]
    of_card = {"license": ", ".join(word for word in licenses_of_card if word) or None, "language": _words(front.get("language"))}
    for name in STATED:
        value = getattr(said, name)
        if name == "license" and value is not None:
            value = licenses.canonical(value)
        if value in (None, []):
            value = of_card.get(name)
        if value not in (None, []):
            yield Fact(name, value, "stated")
    recipe = checkpoint.lineage.options.get("recipe") if checkpoint.lineage is not None else None
    if isinstance(recipe, Mapping):
        sources = sources_of(recipe)
        stated = {name: licenses.canonical(license) for name, license in said.data_licenses.items()}
        yield Fact("data_licenses", {name: stated.get(name) or licenses.corpus_license(corpus) for name, corpus in sources.items()}, "derived")
