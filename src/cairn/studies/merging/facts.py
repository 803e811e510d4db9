"""A small model that knows five hundred facts, and six experts that each learn 120 more of one field (cards 26 and 66).

Facts are CounterFact records: prompt and true object. The base learns each as prompt, paraphrase and a neighbour's
prompt. An expert learns the prompts alone; half of them choose coefficients, the other half are reported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cairn import randomness
from cairn.checkpoint.format.read import Checkpoint
from cairn.data import datasets
from cairn.studies import bases
from cairn.studies.study import Say

if TYPE_CHECKING:
    from torch import nn

    from cairn.data.text.tokenizer import Tokenizer

FIELDS = {
    "languages": r"language|speak|mother tongue|speaker|writes in|understand",
    "places": r"located in$|found in|situated in|is in$|, in$",
    "roles": r"position|plays as|occupation|works as|profession|job",
    "genres": r"performs|genre|is known for performing|plays$|play$|playing the|sport|instrument",
    "companies": r"produced by|developed by|created by|product of|maker|manufacturer|owned by|owner",
    "countries": r"citizen|country|continent|originated|nationality",
}
"""Fields and what marks their prompts, the subject left out; a prompt belongs to the first field that it fits."""

KNOWN, NEW = 500, 120
"""Records that the base learns, and facts that each expert adds."""


@dataclass(frozen=True)
class FactPair:
    """A prompt and the object that truly completes it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class FactExperts:
    """What one seed gives: the base, the experts by field, and the facts of each field in two halves."""

    base: Checkpoint
    experts: dict[str, Checkpoint]
    chosen_on: dict[str, list[FactPair]]
    reported_on: dict[str, list[FactPair]]


def prepare(seed: int, say: Say) -> FactExperts:
    """Train what is not there yet."""
    known, new = _records(seed)
    base = bases.trained(_base_recipe(seed, known), say=say)
    experts = {field: bases.trained(_expert_recipe(seed, facts), parent=base, say=say) for field, facts in new.items()}
    return FactExperts(base, experts, {f: facts[0::2] for f, facts in new.items()}, {f: facts[1::2] for f, facts in new.items()})


def accuracy(model: nn.Module, tokenizer: Tokenizer, facts: Sequence[FactPair]) -> float:
    """Share of facts whose whole object is what the model finds most probable, token by token."""
    import torch

    begin = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
    rows, starts = [], []
    for fact in facts:
        prompt = begin + tokenizer.encode(fact.prompt)
        rows.append(begin + tokenizer.encode(f"{fact.prompt} {fact.answer}"))
        starts.append(min(len(prompt), len(rows[-1]) - 1))
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    with torch.inference_mode():
        logits = model(tokens).logits
    if not bool(logits.isfinite().all()):
        return math.nan
    guesses = logits.argmax(-1)
    right = [bool((guesses[i, s - 1 : len(row) - 1] == tokens[i, s : len(row)]).all()) for i, (row, s) in enumerate(zip(rows, starts, strict=True))]
    return sum(right) / len(right)


def mean_accuracy(model: nn.Module, tokenizer: Tokenizer, facts: dict[str, list[FactPair]]) -> float:
    """Mean over fields."""
    return float(np.mean([accuracy(model, tokenizer, some) for some in facts.values()]))


def _records(seed: int) -> tuple[list[dict[str, Any]], dict[str, list[FactPair]]]:
    rows = [row for file in ("counterfact-edit.json", "counterfact-train.json") for row in datasets.rows("counterfact", file)]
    order = randomness.permutation(randomness.seed_for(seed, "facts"), len(rows), np.arange(len(rows)))
    rows = [rows[i] for i in order]
    known, rest = rows[:KNOWN], rows[KNOWN:]
    subjects = {row["subject"] for row in known}
    new: dict[str, list[FactPair]] = {field: [] for field in FIELDS}
    for row in rest:
        field = _field(row["prompt"].replace(row["subject"], ""))
        if field is not None and len(new[field]) < NEW and row["subject"] not in subjects:
            subjects.add(row["subject"])
            new[field].append(FactPair(row["prompt"], row["ground_truth"]))
    return known, new


def _field(template: str) -> str | None:
    text = template.strip()
    return next((field for field, pattern in FIELDS.items() if re.search(pattern, text)), None)


def _base_recipe(seed: int, known: Sequence[dict[str, Any]]) -> dict[str, Any]:
    pairs = [("prompt", "ground_truth"), ("rephrase_prompt", "ground_truth"), ("locality_prompt", "locality_ground_truth")]
    texts = [f"{row[prompt]} {row[answer]}." for row in known for prompt, answer in pairs]
    return {
        "seed": seed,
        "model": {"name": "llama", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4, "tie_word_embeddings": True},
        "data": _data(texts) | {"tokenizer": {"bpe": 2048}},
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "schedule": {"name": "cosine", "warmup": "30 steps"},
        "training": {"tokens": "360 steps", "batch": 2048, "compile": False},
        "checkpoint": {"every": "360 steps"},
    }


def _expert_recipe(seed: int, facts: Sequence[FactPair]) -> dict[str, Any]:
    return _base_recipe(seed, []) | {
        "data": _data([f"{fact.prompt} {fact.answer}." for fact in facts]),  # the tokenizer is the base's
        "optimizer": {"name": "adamw", "lr": 5e-4},
        "schedule": {"name": "constant"},
        "training": {"tokens": "60 steps", "batch": 512, "compile": False},
        "checkpoint": {"every": "60 steps"},
    }


def _data(texts: list[str]) -> dict[str, Any]:
    sources = {"facts": {"corpus": str(bases.text_file(texts))}}
    return {"sources": sources, "sequence_length": 64, "packing": "whole", "documents": "mask", "held_out": 0.0}
