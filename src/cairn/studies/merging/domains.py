"""A small decoder that has read English and Python, and five brief fine-tunes on texts of one domain each (card 66).

A text is a document: a piece of a play, a problem with its solution, a sentence of a treebank, the beginning of a
module. Some are held out; half of those choose coefficients, the other half are reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cairn import randomness
from cairn.checkpoint.format.read import Checkpoint
from cairn.data import corpora, datasets
from cairn.evaluation.measure import Measurement, Score
from cairn.options import configure
from cairn.studies import bases, library
from cairn.studies.study import Say

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.text.tokenizer import Tokenizer
    from cairn.merging.target import Measure

DOMAINS = ("plays", "problems", "German", "Spanish", "source")
LONGEST, TUNED_ON, HELD_OUT = 2000, 100_000, 30_000
"""Characters: of one document, of an expert's documents, and of each half of a domain's held-out documents."""
LENGTH, WINDOWS = 128, 20
"""Tokens of a window, and windows of a domain that are measured."""
BASE_STEPS, BASE_BATCH, STEPS, BATCH = 400, 1536, 30, 1024


@dataclass(frozen=True)
class DomainExperts:
    """What one seed gives: the base, the experts by domain, and how to measure each domain on either half."""

    base: Checkpoint
    experts: dict[str, Checkpoint]
    chosen_on: list[Measurement]
    reported_on: list[Measurement]


def prepare(seed: int, say: Say) -> DomainExperts:
    """Train what is not there yet."""
    texts = {domain: _dealt(seed, domain) for domain in DOMAINS}
    parts = {domain: parted(some, [HELD_OUT, HELD_OUT, TUNED_ON]) for domain, some in texts.items()}
    base = bases.trained(_base_recipe(seed, parts["source"][3]), say=say)
    experts = {domain: bases.trained(_expert_recipe(seed, part[2]), parent=base, say=say) for domain, part in parts.items()}
    return DomainExperts(base, experts, *([_measurement(part[half]) for part in parts.values()] for half in (0, 1)))


def parted(texts: Sequence[str], sizes: Sequence[int]) -> list[list[str]]:
    """The texts in order, parted where each size (in characters) is reached; the last part is what is left."""
    parts, rest = list[list[str]](), list(texts)
    for size in sizes:
        ends = np.cumsum([len(text) for text in rest])
        count = min(len(rest), int(np.searchsorted(ends, size)) + 1)
        parts.append(rest[:count])
        rest = rest[count:]
    return [*parts, rest]


def mean_loss(model: nn.Module, tokenizer: Tokenizer, domains: Sequence[Measurement]) -> float:
    """Mean over domains of the loss, nats per token."""
    return float(np.mean([domain.of(model, tokenizer)[0].value for domain in domains]))


def drop(domains: Sequence[Measurement], base: float) -> Measure:
    """By which share of the base's mean loss a model's lies below it."""

    def measure(model: nn.Module, tokenizer: Tokenizer) -> Score:
        return Score("domains", "drop of mean loss", 1 - mean_loss(model, tokenizer, domains) / base, float("nan"), len(domains) * WINDOWS)

    return measure


def _dealt(seed: int, domain: str) -> list[str]:
    """A domain's documents in an order that the seed decides."""
    texts = [text[:LONGEST] for text in _documents(domain) if text.strip()]
    return [texts[i] for i in randomness.permutation(randomness.seed_for(seed, domain), len(texts), np.arange(len(texts)))]


def _documents(domain: str) -> list[str]:
    treebanks = {"German": "ud-de-gsd", "Spanish": "ud-es-gsd"}
    if domain in treebanks:
        return [row["text"] for row in datasets.rows(treebanks[domain])]
    named = {"plays": "tiny-shakespeare", "problems": "gsm8k", "source": library.source("8 MiB")}
    return [document.text for document in corpora.resolve(named[domain]).documents()]


def _measurement(texts: Sequence[str]) -> Measurement:
    corpus = str(bases.text_file(texts))
    return configure("measurement", {"name": "held-out", "corpus": corpus, "sequence_length": LENGTH, "sequences": WINDOWS})


def _base_recipe(seed: int, source: Sequence[str]) -> dict[str, Any]:
    english = [row["text"] for row in datasets.rows("ud-en-ewt")] + [row["Text"] for row in datasets.rows("me-ppl")]
    sources = {
        "source": {"corpus": str(bases.text_file(source)), "weight": 1},
        "docs": {"corpus": library.docs("4 MiB"), "weight": 1},
        "english": {"corpus": str(bases.text_file(english)), "weight": 1},
    }
    return {
        "seed": seed,
        "model": {"name": "llama", "hidden_size": 160, "intermediate_size": 416, "num_hidden_layers": 4, "num_attention_heads": 4, "tie_word_embeddings": True},
        "data": {"tokenizer": {"bpe": 2048}, "sources": sources, "sequence_length": LENGTH, "documents": "mask", "held_out": 0.0},
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "schedule": {"name": "cosine", "warmup": "30 steps", "final": 0.1},
        "training": {"tokens": f"{BASE_STEPS} steps", "batch": BASE_BATCH, "compile": False},
        "checkpoint": {"every": f"{BASE_STEPS} steps"},
    }


def _expert_recipe(seed: int, texts: Sequence[str]) -> dict[str, Any]:
    recipe = _base_recipe(seed, [])
    data = {key: value for key, value in recipe["data"].items() if key != "tokenizer"}  # it is the base's
    return recipe | {
        "data": data | {"sources": {"domain": {"corpus": str(bases.text_file(texts))}}},
        "optimizer": {"name": "adamw", "lr": 5e-4},
        "schedule": {"name": "constant"},
        "training": {"tokens": f"{STEPS} steps", "batch": BATCH, "compile": False},
        "checkpoint": {"every": f"{STEPS} steps"},
    }
