"""Model cards as files: their front matter, the claims in it (`model-index`), their sections and code blocks.

A card is somebody's text: it is parsed, never believed and never executed unless that is asked for by name.
"""

from __future__ import annotations

import codecs
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cairn.checkpoint.format import documents
from cairn.errors import DamagedError, InputError
from cairn.registry.statements import Claim

LONGEST = 2**20
"""Characters of a card that are read."""
ENOUGH_WORDS = 20
"""Words that make a section ("present" in card 13, C)."""

SECTIONS: dict[str, tuple[str, ...]] = {
    "intended use": ("intended use", "intended uses", "uses", "use cases", "direct use", "intended purpose"),
    "training data": ("training data", "training dataset", "datasets", "dataset", "data", "pretraining data"),
    "procedure": ("training procedure", "procedure", "training", "pretraining", "preprocessing"),
    "hyperparameters": ("hyperparameters", "training hyperparameters", "hyper-parameters", "training parameters"),
    "evaluation": ("evaluation", "evaluation results", "results", "eval results", "performance", "metrics", "benchmarks"),
    "limitations and bias": ("limitations", "bias", "biases", "risks", "limitations and bias", "bias, risks, and limitations", "ethical considerations"),
    "hardware and energy": ("hardware", "energy", "environmental impact", "compute", "compute infrastructure", "hardware and energy"),
    "license": ("license", "licence", "licensing", "licensing information"),
    "how to use": ("how to use", "usage", "how to get started", "how to get started with the model", "quickstart", "getting started", "inference", "example"),
    "citation": ("citation", "citing", "how to cite", "bibtex", "citation information", "bibtex entry and citation info"),
}
"""What a card should say, and under which headings people say it."""


_UNKNOWN = ("unknown", "not known", "not stated", "none", "tbd", "todo", "more information needed", "[more information needed]")
"""What people write where they say nothing."""


class PlainLoader(yaml.SafeLoader):
    """YAML as people write cards: without aliases, a few lines of which can describe gigabytes; dates stay text, odd ones too, and so do
    `no` and `on`, of which the first is a language."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:bool")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
PlainLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


@dataclass(frozen=True)
class Section:
    """A heading, what stands under it, and how much of that is words, table rows and code."""

    title: str
    level: int
    words: int
    rows: int
    code: tuple[tuple[str, str], ...]
    """Language and text of each code block."""
    text: str = ""
    """The words that stand directly under the heading."""


@dataclass(frozen=True)
class CardScore:
    """How complete a card is. `completeness` is the share of SECTIONS that are present; length beyond that counts for nothing."""

    has_card: bool
    words: int
    completeness: float
    present: tuple[str, ...]
    missing: tuple[str, ...]
    older_than_weights: bool | None = None
    executable: float | None = None
    """Share of the Python blocks that run; None if nobody asked or there are none."""


def text_of(path: Path) -> str:
    """The text of a card, or nothing where there is none; a byte-order mark says how it is encoded and is no part of it."""
    try:
        with os.fdopen(documents.open_file(path), "rb") as file:
            data = file.read(4 * LONGEST)
    except (FileNotFoundError, DamagedError):
        return ""
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    return data.decode(encoding, "replace").replace("\r\n", "\n")[:LONGEST]


def split(text: str) -> tuple[str, str]:
    """The front matter (YAML between lines of dashes at the top, blank lines passed over) and the rest."""
    lines = text.removeprefix("\ufeff").split("\n")
    first = next((number for number, line in enumerate(lines) if line.strip()), 0)
    if lines[first].strip() != "---":
        return "", text
    end = next((number for number, line in enumerate(lines) if number > first and line.strip() in ("---", "...")), None)
    return ("\n".join(lines[first + 1 : end]), "\n".join(lines[end + 1 :])) if end is not None else ("", text)


def front_matter(card: Path | str) -> dict[str, Any]:
    """The front matter of a card (a path or its text) as plain values; empty where there is none or it is not YAML."""
    text = card if isinstance(card, str) else text_of(card)
    try:
        values = yaml.load(split(text)[0], PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def claims_in(card: Path | str) -> list[Claim]:
    """The claims of a card's `model-index`; entries that give no finite number are left out."""
    source = "model card" if isinstance(card, str) else card.name
    found = []
    for model in _list(front_matter(card).get("model-index")):
        for result in _list(_dict(model).get("results")):
            dataset, task = _dict(_dict(result).get("dataset")), _dict(_dict(result).get("task"))
            for metric in _list(_dict(result).get("metrics")):
                claim = _claim(_dict(metric), dataset, task, source)
                if claim is not None:
                    found.append(claim)
    return found


def _claim(metric: Mapping[str, Any], dataset: Mapping[str, Any], task: Mapping[str, Any], source: str) -> Claim | None:
    args = _dict(metric.get("args"))
    value = metric.get("value")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    text = {"dataset": dataset.get("name") or dataset.get("type"), "split": dataset.get("split"), "revision": dataset.get("revision")}
    try:
        return Claim(
            metric=str(metric.get("type") or metric.get("name") or task.get("type") or "unnamed"),
            value=float(value),
            n=args.get("n"),
            stderr=args.get("stderr"),
            task=args.get("protocol") if isinstance(args.get("protocol"), Mapping) else None,
            source=source,
            **{key: str(each) for key, each in text.items() if each is not None},
        )
    except ValidationError:
        return None


def model_index(name: str, claims: Sequence[Claim], task: str = "text-generation") -> list[dict[str, Any]]:
    """Claims as the `model-index` of a card; `claims_in` reads them back. Protocol, n and standard error go into each metric's `args`."""
    results = []
    for claim in claims:
        args = {"n": claim.n, "stderr": claim.stderr, "protocol": claim.task}
        dataset = {"name": claim.dataset, "type": (claim.dataset or "unknown").lower().replace(" ", "-"), "split": claim.split, "revision": claim.revision}
        metric = {"type": claim.metric, "value": claim.value, "args": {key: value for key, value in args.items() if value is not None}}
        results.append(
            {
                "task": {"type": task},
                "dataset": {key: value for key, value in dataset.items() if value is not None},
                "metrics": [{key: value for key, value in metric.items() if value != {}}],
            }
        )
    return [{"name": name, "results": results}]


def sections(text: str) -> list[Section]:
    """The sections of a card's body; what stands under a deeper heading counts for the sections around it, too."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark").enable("table").parse(split(text)[1])
    found: list[dict[str, Any]] = []
    for number, token in enumerate(tokens):
        if token.type == "heading_open":
            found.append({"title": tokens[number + 1].content.strip(), "level": int(token.tag[1]), "words": 0, "rows": 0, "code": [], "text": ""})
            continue
        open_sections: list[dict[str, Any]] = []
        for section in reversed(found):
            if not open_sections or section["level"] < open_sections[-1]["level"]:
                open_sections.append(section)
        for section in open_sections:
            if token.type == "inline" and tokens[number - 1].type != "heading_open":
                section["words"] += len(token.content.split())
                section["text"] += f"{token.content} "
            section["rows"] += token.type == "tr_open"
            if token.type in ("fence", "code_block"):
                section["code"].append((token.info.strip().split(" ")[0] if token.info.strip() else "", token.content))
    return [Section(**{**section, "code": tuple(section["code"])}) for section in found]


def score(text: str, *, weights_time: float | None = None, card_time: float | None = None, run: bool = False) -> CardScore:
    """How complete a card is ("Deep Learning Model Reuse in the HuggingFace Community", card 13, C).

    A section is present when a heading names it and at least 20 words, a table with rows, or a code block stand under it; license also by
    the front matter. `run` executes the card's Python blocks, each alone: only for cards that you trust.
    """
    parts, front = sections(text), front_matter(text)
    present = [name for name, headings in SECTIONS.items() if any(_names(part.title, headings) and _enough(name, part) for part in parts)]
    if "license" not in present and isinstance(front.get("license"), str) and front["license"].strip().lower() not in _UNKNOWN:
        present.append("license")
    body = split(text)[1]
    older = card_time < weights_time if card_time is not None and weights_time is not None else None
    share = executable(block for part in parts for block in part.code) if run else None
    ordered = tuple(name for name in SECTIONS if name in present)
    missing = tuple(name for name in SECTIONS if name not in present)
    return CardScore(bool(body.strip()), len(body.split()), len(ordered) / len(SECTIONS), ordered, missing, older, share)


def executable(blocks: Iterable[tuple[str, str]], seconds: float = 60) -> float | None:
    """Share of the Python blocks that run to their end, each in a process and an empty folder of its own; None if there are none."""
    python = [text for language, text in dict.fromkeys(blocks) if language.lower() in ("python", "py", "python3")]
    if not python:
        return None
    return sum(_runs(text, seconds) for text in python) / len(python)


def _runs(text: str, seconds: float) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            return subprocess.run([sys.executable, "-c", text], cwd=folder, capture_output=True, timeout=seconds, check=False).returncode == 0
        except subprocess.TimeoutExpired:
            return False


def _names(title: str, headings: Sequence[str]) -> bool:
    plain = " ".join("".join(c if c.isalnum() or c in " ,-" else " " for c in title.lower()).split())
    return plain in headings or any(plain.startswith((f"{heading} ", f"{heading},")) or plain.endswith(f" {heading}") for heading in headings)


def _enough(name: str, part: Section) -> bool:
    # Who says that it is unknown has not said it, at whatever length. A license is two words; a table counts when it has a row besides its head.
    if part.text.strip().lower().startswith(_UNKNOWN):
        return False
    return part.words >= ENOUGH_WORDS or part.rows >= 2 or bool(part.code) or (name == "license" and part.words > 0)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def write(path: Path, text: str) -> None:
    """Write a card to a file that must not exist."""
    if path.exists():
        raise InputError(f"{path} exists; name another file.")
    documents.keep(path, text)
